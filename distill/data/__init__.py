"""Images: where they come from, how they are cropped, masked, normalised and served."""
