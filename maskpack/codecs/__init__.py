"""Packed bits <-> fewer bytes: one codec a file. Numpy only, no torch."""
