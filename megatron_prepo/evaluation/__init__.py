"""Held-out pass rates during training, and evaluation on benchmark suites."""
