"""`decant demo`: a page that shows what features see. Imports no torch, so that a bundle's ONNX files are all it needs."""
