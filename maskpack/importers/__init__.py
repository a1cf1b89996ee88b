"""Masks that other tools made, one file per format. The contract is in base.py."""
