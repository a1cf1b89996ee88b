"""Benchmarks: measured by hand, never timed in a test. `make bench-codec`, `make defaults`, `make frontier`."""
