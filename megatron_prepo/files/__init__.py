"""Atomic files, ownership of folders, locks and digests."""
