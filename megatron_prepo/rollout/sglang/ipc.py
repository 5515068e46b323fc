"""Weight transport through memory that trainer and servers of one machine share.

Requests carry handles only.  On GPUs these are CUDA handles of memory on the server rank's device,
created by the trainer rank on the same device, so that nothing is copied between devices.  On a CPU
rank 0 creates one handle, of shared memory that all server ranks map.  While servers copy one
bucket, they already have the next, and the one after that is gathered.
"""

import os
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch.multiprocessing import get_sharing_strategy, reductions, set_sharing_strategy

from megatron_prepo import internals
from megatron_prepo.config import ServersConfig, WeightSyncConfig
from megatron_prepo.errors import UserError
from megatron_prepo.rollout import placement
from megatron_prepo.rollout.engine import Bucket, EngineError, Shapes
from megatron_prepo.rollout.sglang.fleet import Fleet, Server
from megatron_prepo.rollout.sglang.transport import (
    described,
    flatten,
    num_bytes,
    of_one_type,
    serialized,
    update_from_tensor,
)

SHARED_MEMORY = "/dev/shm"
IN_FLIGHT = 2
"""Maximum number of buckets that servers have received and not yet copied."""
DEVICE = 6
"""Index of the device among the arguments of torch's `rebuild_cuda_tensor`."""


class ByIPC:
    """Transport in which all ranks take part; `fleet` is None on ranks other than 0.

    `share` and `gather` are the engine's.  Errors are raised on all ranks.
    """

    in_session = True

    def __init__(
        self,
        fleet: Fleet | None,
        servers: ServersConfig,
        sync: WeightSyncConfig,
        *,
        device: torch.device,
        rank: int,
        share: Callable[[Future[Any] | None], Any],
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self.fleet, self.share, self.gather = fleet, share, gather
        self.servers, self.sync = servers, sync
        self.cuda, self.device = device.type == "cuda", device.index or 0
        # the servers are on the machine of rank 0
        self.near = rank < _num_local_ranks() if self.cuda else rank == 0
        self._buffers: list[torch.Tensor] = []
        self._under_way: deque[Future[Any] | None] = deque()
        self._num_sent = 0

    def start(self, shapes: Shapes) -> None:
        """Begin a new set of weights.  Raises EngineError if there is too little shared memory."""
        self._under_way.clear()
        shortage, devices = None, [0]
        if self.fleet and self.cuda:  # memory given to a failed server would never be released
            alive = [_index(server) for server in self.fleet.alive()]
            devices = [d for index in alive for d in _server_devices(self.servers, index)]
        elif self.fleet:
            shortage = self._make_buffers(shapes)
        shortage, devices = self.gather((shortage, devices))[0]
        if shortage:
            raise EngineError(shortage)
        self.gives = self.near and self.device in devices

    def send(self, bucket: Bucket) -> None:
        """Send a bucket to every server; returns when all but the last IN_FLIGHT were copied."""
        for part in of_one_type(bucket):
            given = self._give(part) if self.gives else None
            all_given = self.gather(given)  # now every rank's memory holds this part
            self._under_way.append(
                self._request(self.fleet, part, all_given) if self.fleet else None
            )
            self._num_sent += 1
            self._wait(IN_FLIGHT)

    def finish(self) -> None:
        """Wait for the last buckets."""
        self._wait(0)
        if self.cuda:
            torch.cuda.ipc_collect()

    def _request(
        self, fleet: Fleet, part: Bucket, given: list[tuple[int, str] | None]
    ) -> Future[None]:
        return fleet.run(
            update_from_tensor(
                fleet,
                lambda server: self._payloads(server, given),
                described(part),
                seconds=self.sync.request_seconds,
            )
        )

    def _wait(self, most: int) -> None:
        """Wait until at most `most` buckets are in progress."""
        while len(self._under_way) > most:
            self.share(self._under_way.popleft())

    def _give(self, part: Bucket) -> tuple[int, str]:
        """Return the device that holds the part, and the payload for the server rank on it."""
        if self.cuda:
            # new memory each time: torch keeps it until the server has released it, and a response
            # may arrive before the copies on the server's stream are complete
            rank = (self.device - self.servers.first_device) % self.servers.tensor
            return self.device, serialized(part, _Reduced(*on_device(flatten(part), rank)))
        # the buffer's previous content has been copied: `send` waits for that
        flat = flatten(part, into=self._buffers[self._num_sent % len(self._buffers)])
        assert self.fleet is not None, "on a CPU, rank 0 alone sends"
        readers = sum(server.num_ranks for server in self.fleet.servers if server.lost is None)
        return self.device, serialized(part, _Reduced(*in_memory(flat, readers)))

    def _payloads(self, server: Server, given: list[tuple[int, str] | None]) -> list[str]:
        """Return one payload per rank of the server."""
        by_device = dict(filter(None, given))
        if not self.cuda:
            return [by_device[self.device]] * server.num_ranks
        return [by_device[device] for device in _server_devices(self.servers, _index(server))]

    def _make_buffers(self, shapes: Shapes) -> str | None:
        """Allocate buffers for the largest bucket; returns an error message if they do not fit."""
        sizes = [num_bytes(dtype, shape) for dtype, shape in shapes.values()]
        size = min(sum(sizes), max(self.sync.bucket_mb << 20, *sizes))
        if self._buffers and len(self._buffers[0]) >= size:
            return None
        self._buffers = []
        free, needed = shutil.disk_usage(SHARED_MEMORY).free, (IN_FLIGHT + 1) * size
        if free < needed:
            return (
                f"weight_sync.transport=ipc needs {needed >> 20} MiB in {SHARED_MEMORY}, and "
                f"{free >> 20} are free: lower weight_sync.bucket_mb={self.sync.bucket_mb}, or "
                "give the machine (docker: --shm-size) more"
            )
        self._buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(IN_FLIGHT + 1)]
        return None


class _Reduced:
    """Object that is pickled as a call."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def in_memory(flat: torch.Tensor, readers: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the call by which other processes map a tensor on the CPU, `readers` times.

    The tensor moves to shared memory under the name of a file, which any process can open.
    A server would crash with a file descriptor, torch's default between related processes.
    """
    strategy, storage = get_sharing_strategy(), flat.untyped_storage()
    set_sharing_strategy("file_system")
    try:
        function, arguments = reductions.reduce_storage(storage)
    finally:
        set_sharing_strategy(strategy)
    internals.require(storage, "_shared_incref")
    for _ in range(
        readers - 1
    ):  # each reader decrements the count, and the last one removes the file
        storage._shared_incref()
    bytes_there = _Reduced(function, (*arguments, flat.dtype))
    metadata = flat.storage_offset(), flat.size(), flat.stride(), False
    return reductions.rebuild_tensor, (torch.Tensor, bytes_there, metadata)


def on_device(flat: torch.Tensor, device: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the call by which a process maps this memory, once; `device` is its number there."""
    function, arguments = reductions.reduce_tensor(flat)
    return function, (*arguments[:DEVICE], device, *arguments[DEVICE + 1 :])


def check(servers: ServersConfig, device: torch.device) -> None:
    """Raise UserError for a server on a device of which no rank can create a handle."""
    if device.type != "cuda":
        return
    if servers.urls:
        raise UserError(
            "weight_sync.transport=ipc: which devices the servers of servers.urls have is not "
            "known; let the run start its servers, or choose another weight_sync.transport"
        )
    num_local = _num_local_ranks()
    if without := [d for d in _devices(servers) if d >= num_local]:
        raise UserError(
            f"weight_sync.transport=ipc: devices {without} have a server's rank (servers."
            "first_device, servers.count, servers.tensor), and none of the actor's, of which this "
            f"machine has {num_local}; choose weight_sync.transport=distributed"
        )


def _index(server: Server) -> int:
    """Return the index of a server that the run started."""
    assert server.own is not None, "check refuses servers.urls"
    return server.own.index


def _num_local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _devices(servers: ServersConfig) -> list[int]:
    count = placement.servers_here(servers, cuda=True)
    return [d for index in range(count) for d in _server_devices(servers, index)]


def _server_devices(servers: ServersConfig, index: int) -> range:
    """Return the devices of the server with this index, as the trainer numbers them."""
    first = servers.first_device + index * servers.tensor
    return range(first, first + servers.tensor)
