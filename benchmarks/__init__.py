"""Measurements, run as `python -m benchmarks.NAME`: each prints its figures beside a named peer and the machine's own limit."""
