"""Data sources, one a file, and what training and evaluation read of them."""
