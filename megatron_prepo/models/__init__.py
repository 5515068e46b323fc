"""Facts about model families: configuration, names, formats, operations."""
