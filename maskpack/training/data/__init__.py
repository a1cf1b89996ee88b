"""Data sources, and what training and evaluation read of them."""
