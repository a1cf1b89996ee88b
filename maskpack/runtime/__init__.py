"""Adapters on a model: applied in place, restored to the bit."""
