"""Shipping: graphs, quantization, engines, runtimes, proofs, measurements, report, bundle. Imports `distill`, never `recipes`."""
