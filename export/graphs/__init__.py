"""Graphs and what is done to them: reading, types, anatomy, rewriting for a runtime."""
