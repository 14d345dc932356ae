"""Bundles on other machines, over the system's own ssh: copied, verified, tested and timed there, and the numbers brought home."""
