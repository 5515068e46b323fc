"""Reading and writing of tensors at offsets of files, without an intermediate copy; thread-safe."""

import os

import torch

PIECE = 1 << 20
"""Bytes per write: writes of tens of megabytes had only a half to a seventh of the throughput."""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def read_into(descriptor: int, tensor: torch.Tensor, offset: int) -> None:
    """Fill a contiguous tensor from a file."""
    left = tensor_bytes(tensor) if tensor.numel() else b""
    while left:
        count = os.preadv(descriptor, [left], offset)
        assert count > 0, "the file was truncated while it was read"
        left, offset = left[count:], offset + count


def write_at(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """Write bytes to a file at an offset."""
    left = memoryview(data)
    while left:
        count = os.pwrite(descriptor, left[:PIECE], offset)
        left, offset = left[count:], offset + count
