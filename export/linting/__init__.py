"""The rules of `decant lint` and their output."""
