"""Held-out pass rates during training, and suites of benchmarks."""
