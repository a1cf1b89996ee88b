"""Benchmarks: measured by hand, never timed in a test. `make bench-codec`, `make compression`, `make results`."""
