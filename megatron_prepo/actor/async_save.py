"""Writing of checkpoints: planned on all ranks, written by one thread per rank, renamed by rank 0.

The thread reads tensors that do not change: the originals while the run waits, or copies in host
memory while the run continues.  The directory is renamed only when all ranks have written, so that
an interrupted save leaves a `.partial` directory and the previous checkpoint.
"""

import inspect
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_prepo import internals
from megatron_prepo.actor import manifest, parallel
from megatron_prepo.errors import full_disk
from megatron_prepo.files.atomic import flush, naming

# Megatron forks one process per file.  If the rank is killed, its fork waits forever for a lock
# that the rank held: here the writers are threads, and the queue for their results needs no
# separate process either.
_THREADS = SimpleNamespace(
    Process=threading.Thread,
    Queue=queue.Queue,
    JoinableQueue=queue.Queue,
    Manager=lambda: SimpleNamespace(Queue=queue.Queue),
)
internals.require(filesystem_async, "mp")
internals.require(filesystem_async.mp, "get_context")
internals.replace(
    filesystem_async,
    "mp",
    SimpleNamespace(**vars(filesystem_async.mp) | {"get_context": lambda *_, **__: _THREADS}),
)

_ASYNCHRONOUS: dict[str, bool | str] = {"async_sharded_save": True}
if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
    _ASYNCHRONOUS["async_strategy"] = "mcore"  # from 0.19 on, the default needs another package


class HostBuffers:
    """Host memory for the tensors of a checkpoint, which the next checkpoint reuses.

    Allocating new memory costs more than filling it.  On CUDA it is page-locked, so that copies run
    at the speed of the bus.
    """

    def __init__(self) -> None:
        self.room: list[torch.Tensor] = []

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies of tensors, in order; those of the previous call are overwritten."""
        if [(t.shape, t.dtype) for t in tensors] != [(t.shape, t.dtype) for t in self.room]:
            self.room = []  # different tensors: release the old buffers first
            self.room = [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in tensors]
        for mine, tensor in zip(self.room, tensors, strict=True):
            mine.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()
        return self.room


class PendingCheckpoint:
    """A checkpoint that is being written; every rank calls the same methods, all collective."""

    def __init__(
        self,
        state: dict[str, Any],
        aside: Path,
        *,
        metadata: dict[str, Any],
        buffers: HostBuffers | None,
        small_files: dict[str, bytes],
        publish: Callable[[], None],
    ) -> None:
        """Start to write `state`, or copies of its tensors, to the empty directory `aside`.

        `small_files` are written by this rank; rank 0 calls `publish` when all ranks have written.
        """
        self.aside, self.small_files, self.publish = aside, small_files, publish
        # tensors with several replicas are split between them, and copied and written by one each
        strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        self.request = dist_checkpointing.save(
            state, str(aside), strategy, content_metadata=metadata, **_ASYNCHRONOUS
        )
        self.results: queue.Queue[Any] | None
        _, buckets, self.results = self.request.async_fn_args or (None, [], None)
        self.buckets = _on_the_host(buckets, buffers)
        self.result: Any = None
        self.sums: dict[str, manifest.Entry] = {}
        self.error: str | None = "its thread ended early"
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self.thread.start()

    def done(self) -> bool:
        """Return whether `finish` would return without waiting."""
        return not any(parallel.gather_to_all(self.thread.is_alive()))

    def finish(self, timeout_minutes: float, check: Callable[[], None] = lambda: None) -> None:
        """Wait until all ranks have written, then rename the checkpoint to its final name.

        `check`, which is collective, raises if the checkpoint may not be renamed any more.  Raises
        OSError on all ranks if one could not write or exceeds the timeout.
        """
        late = time.monotonic() + 60 * timeout_minutes
        while True:
            self.thread.join(parallel.SIGN_OF_LIFE_SECONDS)
            writing = self.thread.is_alive()
            ranks = parallel.gather_to_all((writing, time.monotonic() > late, self.error))
            if not any(writing for writing, _, _ in ranks):
                break
            if any(is_late for _, is_late, _ in ranks):
                raise TimeoutError(f"{self.aside} is not written after {timeout_minutes} minutes")
        check()
        for rank, (_, _, error) in enumerate(ranks):
            if error is not None:
                # rank 0 may have started the next one, and removed this one
                free = shutil.disk_usage(self.aside.parent).free >> 20
                raise OSError(
                    f"rank {rank} could not write {self.aside} ({free:,} MiB are free there): "
                    f"{error}"
                )
        if self.results is not None:
            self.results.put(self.result)
        for finalize in self.request.finalize_fns:
            finalize()
        dist.barrier()
        manifest.write(self.aside, self.sums)
        if dist.get_rank() == 0:
            self.publish()
        dist.barrier()

    def _write(self) -> None:
        """Write this rank's files and compute their checksums, in the thread."""
        try:
            self.error = self._write_files()
        except OSError as error:
            self.error = str(error)

    def _write_files(self) -> str | None:
        if self.results is not None:
            self.request.async_fn(dist.get_rank(), self.buckets, self.results)
            self.result = self.results.get_nowait()
            if isinstance(self.result, Exception):
                # torch closes its archive after a failed write, which fails as well
                return full_disk(self.result) or str(self.result)
        files = [Path(file) for file, _, _ in self.buckets]
        self.buckets = []  # a copy of the model is large
        for name, content in self.small_files.items():
            files.append(self.aside / name)
            with naming(files[-1]):
                files[-1].write_bytes(content)
            flush(files[-1])
        self.sums = {file.name: manifest.file_entry(file) for file in files}
        return None


def _on_the_host(buckets: list[Any], buffers: HostBuffers | None) -> list[Any]:
    """Return Megatron's descriptions of files with their tensors in host memory."""
    tensors = [tensor for *_, (_, pairs) in buckets for _, tensor in pairs]
    here = iter(buffers.copy(tensors) if buffers else [tensor.cpu() for tensor in tensors])
    return [
        (file, key, (values, [(item, next(here)) for item, _ in pairs]))
        for file, key, (values, pairs) in buckets
    ]
