"""Training objectives, those of a kind in one file."""
