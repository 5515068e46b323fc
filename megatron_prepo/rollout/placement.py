"""What runs where: the ranks and the engines of a run, on its nodes and their GPUs.

`plan`, `launch`, `doctor` and `train` ask this module, so that what is planned is what is started.

| engine | its GPUs | started by |
|---|---|---|
| embedded | the ranks', one engine on each | the ranks |
| SGLang, `servers.urls` | the user's | the user |
| SGLang, ranks on one node | from `servers.first_device` on | the run |
| SGLang, ranks on more nodes | the ranks', on each node | the job |
| SGLang, `servers.nodes` | those of additional nodes, the last ones of the job | the job |
"""

import os
from dataclasses import dataclass
from typing import Literal

from megatron_prepo.config import Config, ServersConfig
from megatron_prepo.errors import UserError

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Placement:
    """Ranks and engines of a run."""

    nodes: int
    """Nodes with ranks."""
    ranks_per_node: int
    gpus_per_node: int
    """GPUs that each node of the job must have."""
    server_nodes: int
    """Additional nodes, with servers only."""
    started_by: Literal["ranks", "run", "job", "user"]
    """Who starts the engines; `ranks`: the embedded engine is a part of them."""
    engines: int
    """Number of engines: of ranks with the embedded engine, or of servers."""
    servers_per_node: int
    """Servers that run or job start on a node; 0 if neither does."""
    tensor: int
    """GPUs per engine."""
    shared: bool
    """Whether engines use GPUs of ranks."""

    @property
    def ranks(self) -> int:
        """Number of ranks, which is the number of GPUs that train."""
        return self.nodes * self.ranks_per_node

    @property
    def engine_gpus(self) -> int:
        """Number of GPUs that generate; 0 if they are the user's, whose number is not known."""
        return 0 if self.started_by == "user" else self.engines * self.tensor

    @property
    def engines_in_words(self) -> str:
        """Number, GPUs, place and starter of the engines."""
        if self.started_by == "user":
            return "SGLang servers of servers.urls, on GPUs that are not counted here"
        gpus = f"{self.tensor} GPU{'s' * (self.tensor > 1)} each"
        on = "the ranks' GPUs" if self.shared else "separate GPUs"
        if self.server_nodes:
            on = f"{self.server_nodes} separate node{'s' * (self.server_nodes > 1)}"
        start = (
            "in the ranks" if self.started_by == "ranks" else f"started by the {self.started_by}"
        )
        return f"{self.engines} of {gpus} on {on}, {start}"

    @property
    def gpus(self) -> int:
        """Number of GPUs that the job occupies."""
        return (self.nodes + self.server_nodes) * self.gpus_per_node


def place(
    config: Config,
    *,
    nodes: int | None = None,
    gpus_per_node: int = GPUS_PER_NODE,
) -> Placement:
    """Return what runs where, on nodes that have this many GPUs.

    Without `nodes`, there are as many as the ranks of the layout need, and they may leave GPUs
    unused; with it, there is a rank for each GPU.
    Raises UserError for ranks that do not fill their nodes, and for servers that do not fit.
    """
    ranks_per_node = gpus_per_node
    if nodes is None:
        ranks_per_node = min(gpus_per_node, config.parallel.num_ranks)
        nodes, rest = divmod(config.parallel.num_ranks, ranks_per_node)
        if rest:
            raise UserError(
                f"the {config.parallel.num_ranks} ranks of the layout (or --gpus) do not fill "
                f"nodes of {gpus_per_node} GPUs; use a multiple of {gpus_per_node}, or "
                "--gpus-per-node"
            )
    servers, server_nodes = config.servers, config.servers.nodes
    served = config.rollout.engine == "sglang"
    if server_nodes and not served:
        raise UserError(
            f"servers.nodes={server_nodes} (--server-nodes) is for SGLang: set "
            "rollout.engine=sglang, or servers.nodes=0"
        )
    if not served or servers.urls:
        return Placement(
            nodes=nodes,
            ranks_per_node=ranks_per_node,
            gpus_per_node=ranks_per_node,
            server_nodes=0,
            started_by="user" if served else "ranks",
            engines=len(servers.urls) if served else nodes * ranks_per_node,
            servers_per_node=0,
            tensor=servers.tensor if served else 1,
            shared=not served,
        )
    by_job = nodes + server_nodes > 1
    if by_job and servers.first_device:
        raise UserError(
            f"servers.first_device={servers.first_device} is for a job of one node; on more, "
            "servers share the GPUs of all ranks, or have separate nodes (servers.nodes)"
        )
    ranks_beside = 0 if server_nodes else ranks_per_node
    count = servers_per_node(servers, ranks=ranks_beside, gpus=gpus_per_node)
    shared = servers.first_device < ranks_beside
    last = servers.first_device + count * servers.tensor
    return Placement(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpus_per_node=gpus_per_node if server_nodes else max(ranks_per_node, last),
        server_nodes=server_nodes,
        started_by="job" if by_job else "run",
        engines=count * (server_nodes or nodes),
        servers_per_node=count,
        tensor=servers.tensor,
        shared=shared,
    )


def servers_per_node(servers: ServersConfig, *, ranks: int, gpus: int) -> int:
    """Return the servers that are started on a node of this many GPUs, the first of them ranks'.

    Raises UserError if they do not fit.
    """
    first, tensor = servers.first_device, servers.tensor
    room = (ranks if first < ranks else gpus) - first
    if servers.count is None and room % tensor:
        raise UserError(
            f"servers.tensor={tensor} does not divide the {room} GPUs of a node that "
            "are for servers; choose a divisor, or set servers.count"
        )
    count = servers.count or room // tensor
    if not count or count * tensor > gpus - first:
        raise UserError(
            f"servers.count={servers.count or 'empty'} servers of servers.tensor={tensor} GPUs, "
            f"from servers.first_device={first} on, do not fit a node of {gpus} GPUs; lower one of "
            "them"
        )
    return count


def servers_here(servers: ServersConfig, *, cuda: bool, ranks: int | None = None) -> int:
    """Return the servers that a run starts on this machine, beside its ranks if there are any.

    `ranks` defaults to those that the launcher of this process started here.
    """
    if servers.count or not cuda:
        return servers.count or 1
    import torch  # takes seconds, which a plan should not wait for

    gpus = torch.cuda.device_count()
    ranks = ranks or int(os.environ.get("LOCAL_WORLD_SIZE", gpus))
    return servers_per_node(servers, ranks=min(ranks, gpus), gpus=gpus)


def check_transport(transport: str, where: Placement) -> None:
    """Raise UserError if `weight_sync.transport` cannot reach servers on the GPUs where they are.

    On a CPU every transport reaches every server of the machine.
    """
    ours = where.started_by in ("run", "job")
    if ours and where.shared and transport == "distributed":
        raise UserError(
            "weight_sync.transport=distributed needs servers on separate GPUs: set servers.nodes "
            "(--server-nodes) or servers.first_device, or choose value or disk"
        )
    if ours and transport == "ipc" and not (where.shared and where.nodes == 1):
        raise UserError(
            f"weight_sync.transport=ipc reaches only servers that share the GPUs of ranks on one "
            f"node, but this run has {where.nodes} nodes with ranks and servers "
            f"{'on their GPUs' if where.shared else 'on other GPUs'}: set "
            f"weight_sync.transport={'disk' if where.shared else 'distributed'}"
        )


def place_here(config: Config) -> Placement:
    """Return what runs where if this machine starts all ranks, or else on nodes like it.

    Without GPUs it stands for one of GPUS_PER_NODE, or of as many as there are ranks if these do
    not fill such nodes.
    """
    import torch

    ranks, gpus = config.parallel.num_ranks, torch.cuda.device_count() or GPUS_PER_NODE
    return place(config, gpus_per_node=ranks if ranks > gpus and ranks % gpus else gpus)
