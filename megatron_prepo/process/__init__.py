"""Processes, ports, signals and machines."""
