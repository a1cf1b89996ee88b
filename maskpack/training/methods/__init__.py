"""Weights -> scores -> mask: one method a file."""
