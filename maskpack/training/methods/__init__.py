"""Masking methods, those of a kind in one file."""
