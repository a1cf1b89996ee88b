"""Masks inside other libraries' training: one thin file each."""
