"""Benchmarks of training; `python -m benchmarks` runs them."""
