"""The frozen backbone: loading it, choosing its parameters, its fingerprint, its head."""
