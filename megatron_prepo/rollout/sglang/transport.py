"""Transports of weights to the servers, bucket by bucket.  Only rank 0 uses those of this file.

| transport | how | for |
|---|---|---|
| `value` | the bytes, base64, inside an HTTP request | any layout; slowest |
| `distributed` | a broadcast to all servers' ranks | servers on separate devices |
| `disk` | safetensors files that the servers read | any layout with a shared file system |
| `ipc` (`ipc.py`) | memory that both sides map | servers on the actor's devices |

A transport has `start`, `send` (a bucket) and `finish`, which returns when all servers have all
buckets.  `in_session`: used between `begin_weight_update` and `end_weight_update`, if the server
has these.  Servers silently ignore unknown names, and some crash on a wrong shape; names and shapes
are therefore compared before anything is sent (`weight_sync.py`).
"""

import base64
import contextlib
import math
import pickle
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_prepo import internals
from megatron_prepo.files import ownership
from megatron_prepo.models.hf_files import HFWriter
from megatron_prepo.rollout.engine import Bucket, EngineError, Shapes, SyncBroken
from megatron_prepo.rollout.sglang.fleet import POLL_SECONDS, Fleet, Server


class Transport(Protocol):
    """One way in which weights reach the servers."""

    in_session: bool

    def start(self, shapes: Shapes) -> None:
        """Begin a new set of weights."""

    def send(self, bucket: Bucket) -> None:
        """Send a bucket to every server."""

    def finish(self) -> None:
        """Wait until all servers have all buckets."""


class ByValue:
    """Transport inside the requests; the next bucket is gathered while one is sent."""

    in_session = True

    def __init__(self, fleet: Fleet, *, seconds: float) -> None:
        self.fleet, self.seconds = fleet, seconds
        self._under_way: Future[None] | None = None

    def start(self, shapes: Shapes) -> None:
        """Begin a new set of weights."""

    def send(self, bucket: Bucket) -> None:
        """Send a bucket to every server; returns when the previous one has arrived."""
        for part in of_one_type(bucket):
            # storage is sent by value; torch's default between related processes is a shared file,
            # and a server that cannot open it crashes
            payload = serialized(part, flatten(part).cpu())

            def payloads(server: Server, payload: str = payload) -> list[str]:
                return [payload] * server.num_ranks

            self._wait()
            self._under_way = self.fleet.run(
                update_from_tensor(
                    self.fleet,
                    payloads,
                    described(part),
                    seconds=self.seconds,
                )
            )

    def finish(self) -> None:
        """Wait for the last bucket."""
        self._wait()

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way:
            under_way.result()


class Distributed:
    """Broadcast from rank 0 in a process group, which is created again when servers change."""

    in_session = True

    def __init__(self, fleet: Fleet, *, seconds: float, address: str, device: torch.device) -> None:
        self.fleet, self.seconds, self.address, self.device = fleet, seconds, address, device
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self._group: dist.ProcessGroup | None = None
        self._meeting_place: dist.TCPStore | None = None
        self._name, self._changes, self._founded = "", 0, 0
        # an existing server may still be in a group of an earlier run, and rejects that name
        self._run_name = secrets.token_hex(4)

    def start(self, shapes: Shapes) -> None:
        """Create the group, unless the existing one consists of the servers that are alive.

        Raises EngineError if not all join by the deadline, and SyncBroken if one of them failed.
        """
        if self._group is not None and self._changes == self.fleet.changes:
            return
        self._leave()
        self._changes = self.fleet.changes
        members = [(server.url, server.num_ranks) for server in self.fleet.alive()]
        self._founded += 1
        self._name = f"megatron_prepo_{self._run_name}_{self._founded}"
        size = 1 + sum(num_ranks for _, num_ranks in members)
        offsets, next_rank = {}, 1
        for url, num_ranks in members:
            offsets[url], next_rank = next_rank, next_rank + num_ranks
        timeout = timedelta(seconds=self.seconds)
        # NCCL needs it until the first broadcast
        self._meeting_place = dist.TCPStore(
            self.address, 0, is_master=True, wait_for_workers=False, timeout=timeout
        )
        port = self._meeting_place.port
        where = f"{self.address}:{port}"
        joining = self.fleet.run(
            ask_all(
                self.fleet,
                "/init_weights_update_group",
                lambda server: {
                    "master_address": self.address,
                    "master_port": port,
                    "rank_offset": offsets[server.url],
                    "world_size": size,
                    "group_name": self._name,
                    "backend": self.backend,
                },
                f"founding a process group at {where}",
                seconds=self.seconds,
            )
        )
        pool = ThreadPoolExecutor(1, "founding")
        founding = pool.submit(join_group, where, 0, size, self._name, self.backend, timeout)
        pool.shutdown(wait=False)
        while not self._lost_one() and wait([founding], POLL_SECONDS).not_done:
            pass
        if self._lost_one():  # closing the store unblocks the ranks that wait in it
            self._meeting_place = None
        try:
            self._group = founding.result()
        except RuntimeError as error:
            others = joining.exception()  # returns by its own deadline
            if self._lost_one():
                raise SyncBroken(f"{where} was not founded: {error}\n{self._losses()}") from error
            if others:  # the servers' error has more detail
                raise others from error
            raise EngineError(
                f"{[url for url, _ in members]} did not join the process group for weights at "
                f"{where}: {error}"
            ) from error
        joining.result()

    def send(self, bucket: Bucket) -> None:
        """Announce a bucket to every server, and broadcast it.

        Raises SyncBroken if a server fails: a new group without it is needed.
        """
        for part in of_one_type(bucket):
            flat = flatten(part).to(self.device)
            announcement = {
                "names": [name for name, _ in part],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in part],
                "shapes": [list(tensor.shape) for _, tensor in part],
                "group_name": self._name,
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }

            def body(server: Server, announcement: dict[str, Any] = announcement) -> dict[str, Any]:
                return announcement

            receiving = self.fleet.run(
                ask_all(
                    self.fleet,
                    "/update_weights_from_distributed",
                    body,
                    described(part),
                    seconds=self.seconds,
                )
            )
            sending = None
            try:
                sending = dist.broadcast(flat, src=0, group=self._group, async_op=True)
                while not self._lost_one() and wait([receiving], POLL_SECONDS).not_done:
                    pass
                if self._lost_one():
                    sending = None
                    self._abandon()
                receiving.result()
                if self._lost_one():
                    raise SyncBroken(f"{described(part)} did not reach all servers")
                assert sending is not None, "rank 0 is a member of the group"
                sending.wait()
            except RuntimeError as error:
                self._abandon()
                if self._lost_one():
                    raise SyncBroken(f"{error}\n{self._losses()}") from error
                if isinstance(error, EngineError):
                    raise
                raise SyncBroken(f"{described(part)} was not sent: {error}") from error

    def finish(self) -> None:
        """Do nothing: `send` waits for each bucket."""

    def _lost_one(self) -> bool:
        return self._changes != self.fleet.changes

    def _losses(self) -> str:
        return "\n".join(f"{s.url}: {s.lost}" for s in self.fleet.servers if s.lost)

    def _abandon(self) -> None:
        """Destroy the group, which unblocks the ranks that wait in it."""
        group, self._group = self._group, None
        if group is None:
            return
        if self.backend == "nccl":  # an unfinished broadcast would terminate the process
            group.abort()
        else:  # gloo closes its connections when the last reference to the group is dropped
            dist.destroy_process_group(group)

    def _leave(self) -> None:
        if self._group is None:
            return
        leaving = self.fleet.run(
            self.fleet.call_all(
                "/destroy_weights_update_group",
                lambda server: {"group_name": self._name},
                seconds=self.seconds,
            )
        )
        with contextlib.suppress(EngineError):  # a restarted server has no group
            leaving.result()
        dist.destroy_process_group(self._group)
        self._group = None


class FromDisk:
    """Transport through a Hugging Face directory, removed once all servers have read it."""

    in_session = False
    kind = "weights for servers"
    """Kind of directory in its marker (`ownership.py`)."""

    def __init__(self, fleet: Fleet, *, seconds: float, directory: Path, like: str) -> None:
        self.fleet, self.seconds, self.directory, self.like = fleet, seconds, directory, like

    def start(self, shapes: Shapes) -> None:
        """Begin to write."""
        self._writer = HFWriter(self.directory, shapes, like=self.like, kind=self.kind)

    def send(self, bucket: Bucket) -> None:
        """Write a bucket."""
        for name, tensor in bucket:
            self._writer.write(name, tensor)

    def finish(self) -> None:
        """Have all servers read what was written."""
        self._writer.finish()
        reading = self.fleet.run(
            ask_all(
                self.fleet,
                "/update_weights_from_disk",
                lambda server: {
                    "model_path": str(self.directory.resolve()),
                    "load_format": "auto",
                    "flush_cache": False,
                },
                str(self.directory),
                seconds=self.seconds,
            )
        )
        reading.result()
        ownership.make_room(self.directory, self.kind)


def of_one_type(bucket: Bucket) -> Iterator[Bucket]:
    """Yield the bucket's tensors by type, since bytes of one type can be split at any tensor."""
    for dtype in dict.fromkeys(tensor.dtype for _, tensor in bucket):
        yield [(name, tensor) for name, tensor in bucket if tensor.dtype == dtype]


def num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Return the size of a tensor in bytes."""
    size: int = math.prod(shape) * dtype.itemsize
    return size


def flatten(bucket: Bucket, into: torch.Tensor | None = None) -> torch.Tensor:
    """Return the concatenated bytes of all tensors; `into`: a larger tensor to write them to."""
    flat = [t.detach().contiguous().view(-1).view(torch.uint8) for _, t in bucket]
    return torch.cat(flat, out=None if into is None else into[: sum(map(len, flat))])


def serialized(bucket: Bucket, flat: object) -> str:
    """Return what SGLang calls a flattened bucket, as text; unpickled, `flat` is its bytes.

    SGLang unpickles only classes on its list.  `SimpleNamespace` is, and has the attributes of its
    `FlattenedTensorMetadata`.
    """
    # A pickle names the function that reads a tensor's bytes.  megatron-core 0.19 replaces torch's
    # with its own, which the server does not have.
    internals.require(torch.storage, "_load_from_bytes")
    reader = torch.storage._load_from_bytes
    reader.__module__, reader.__qualname__ = "torch.storage", "_load_from_bytes"
    metadata, start = [], 0
    for name, tensor in bucket:
        size = num_bytes(tensor.dtype, tensor.shape)
        metadata.append(
            SimpleNamespace(
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                start_idx=start,
                end_idx=start + size,
                numel=size,
            )
        )
        start += size
    return base64.b64encode(pickle.dumps({"flattened_tensor": flat, "metadata": metadata})).decode()


def described(bucket: Bucket) -> str:
    """Return the name of a bucket for an error message."""
    first, last = bucket[0][0], bucket[-1][0]
    return first if first == last else f"{first} ... {last}"


async def update_from_tensor(
    fleet: Fleet, payloads_of: Callable[[Server], list[str]], what: str, *, seconds: float
) -> None:
    """Have the servers load a bucket; `payloads_of` returns one text per rank of a server."""
    await ask_all(
        fleet,
        "/update_weights_from_tensor",
        lambda server: {
            "serialized_named_tensors": payloads_of(server),
            "load_format": "flattened_bucket",
            "flush_cache": False,
        },
        what,
        seconds=seconds,
    )


async def ask_all(
    fleet: Fleet,
    path: str,
    body_of: Callable[[Server], dict[str, Any]],
    what: str,
    *,
    seconds: float,
) -> None:
    """Call `Fleet.call_all`; raises EngineError that names `what` unless all report success."""
    try:
        answers = await fleet.call_all(path, body_of, seconds=seconds)
    except EngineError as error:
        raise EngineError(f"{what}: {error}") from error
    for url, answer in answers.items():
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise EngineError(f"{what}: {url} answered {str(answer)[:300]}")


def join_group(
    where: str, rank: int, size: int, name: str, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Return a process group in addition to the default one, created as SGLang creates its half.

    `where`: `ADDRESS:PORT` of an existing `TCPStore`.  torch has no public function for a group
    with members of another job; this must take the same steps as SGLang's
    `init_custom_process_group`.
    """
    from torch.distributed import distributed_c10d as c10d

    internals.require(c10d, "_new_process_group_helper", "_world")
    address, _, port = where.rpartition(":")
    store = dist.TCPStore(address, int(port), is_master=False, timeout=timeout)
    group, _ = c10d._new_process_group_helper(
        size,
        rank,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    return group
