"""Masking methods, one a file."""
