"""Reused memory: allocating new pages takes more time than filling them.

The memory of a large tensor is allocated page by page and returned to the system when it is freed;
at several gigabytes per second this dominates the time of a copy.  Each thread allocates the
tensors of a task from one buffer, which the next task reuses.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

ALIGNMENT = 64


class Arena:
    """Tensors that are valid until the task ends; one buffer per thread, at most `keep_bytes`."""

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._local = threading.local()

    @contextmanager
    def task(self) -> Iterator[None]:
        """Return a context for a task; tensors from `empty` are invalid after it."""
        local = self._local
        local.used = local.wanted = 0
        local.buffer = getattr(local, "buffer", torch.empty(0, dtype=torch.uint8))
        try:
            yield
        finally:
            if local.buffer.numel() < local.wanted <= self._keep_bytes:
                local.buffer = torch.empty(local.wanted, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised contiguous tensor, from the thread's buffer if it has room."""
        local = self._local
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        local.wanted += size
        if local.used + size > local.buffer.numel():
            return torch.empty(tuple(shape), dtype=dtype)
        place = local.buffer[local.used : local.used + tensor.nbytes]
        local.used += size
        return place.view(dtype).view(tuple(shape))
