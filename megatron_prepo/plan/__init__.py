"""Memory and time of a layout, computed before a job is submitted."""
