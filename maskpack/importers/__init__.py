"""Masks that other tools made, formats of a kind in one file. The contract is in base.py."""
