"""One training step per stage."""
