"""The parts of a bundle: archive, trust, golden vectors, papers, layouts."""
