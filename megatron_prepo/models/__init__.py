"""Every fact about a model family: configuration, names, formats, operations."""
