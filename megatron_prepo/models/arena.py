"""Memory that is used again: fresh pages cost more time than the bytes that are put on them.

A large tensor's memory comes from the system page by page and goes back as soon as it is freed; at
several gigabytes a second that is most of a copy's time.  Each thread takes the tensors of a task
from one buffer, which the next task uses again.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

ALIGNMENT = 64


class Arena:
    """Tensors that live until the task ends; one buffer a thread, of at most `keep_bytes`."""

    def __init__(self, keep_bytes: int):
        self._keep_bytes = keep_bytes
        self._local = threading.local()

    @contextmanager
    def task(self) -> Iterator[None]:
        """What `empty` gives inside is invalid after it."""
        local = self._local
        local.used = local.wanted = 0
        local.buffer = getattr(local, "buffer", torch.empty(0, dtype=torch.uint8))
        try:
            yield
        finally:
            if local.buffer.numel() < local.wanted <= self._keep_bytes:
                local.buffer = torch.empty(local.wanted, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor, from the thread's buffer if there is room in it."""
        local = self._local
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        local.wanted += size
        if local.used + size > local.buffer.numel():
            return torch.empty(tuple(shape), dtype=dtype)
        place = local.buffer[local.used : local.used + tensor.nbytes]
        local.used += size
        return place.view(dtype).view(tuple(shape))
