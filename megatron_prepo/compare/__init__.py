"""Runs of several methods on equal terms, and the page about them."""
