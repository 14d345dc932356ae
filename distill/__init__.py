"""Learning: backbones, data, objectives, the one training loop, evaluation. Imports neither `export` nor `recipes`."""
