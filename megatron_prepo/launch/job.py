"""Command lines of a job on its nodes, independent of NeMo-Run.

engine                 servers                         started by
embedded, servers.urls none                            -
sglang, one node       set by the section `servers`    the run, on the node of rank 0
sglang, more nodes     one per `servers.tensor` GPUs, on the nodes of the ranks   the job
the same, with `server_nodes`                          on additional nodes        the job
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prepo import config as configuration
from megatron_prepo.config import Config
from megatron_prepo.errors import UserError
from megatron_prepo.launch import recipes
from megatron_prepo.rewards import check_name


@dataclass(frozen=True)
class Job:
    """A run and its nodes."""

    path: Path
    overrides: tuple[str, ...]
    config: Config
    nodes: int
    """Number of training nodes."""
    gpus_per_node: int
    server_nodes: int = 0
    """Number of additional nodes, after those of the ranks, for SGLang servers only."""

    @property
    def name(self) -> str:
        """Name of the job, such as `qwen2.5-7b-prepo`."""
        return f"{self.path.parent.name}-{self.path.stem}"

    @property
    def ranks(self) -> int:
        """Number of training GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def starts_servers(self) -> bool:
        """Whether the job starts the SGLang servers, instead of the run or the user."""
        wanted = self.config.rollout.engine == "sglang" and not self.config.servers.urls
        return wanted and self.nodes + self.server_nodes > 1

    @property
    def servers_a_node(self) -> int:
        """Number of SGLang servers that use all GPUs of a node."""
        return self.gpus_per_node // self.config.servers.tensor

    def train_words(self) -> list[str]:
        """Return the arguments of `python -m` for each rank under torchrun."""
        return ["megatron_prepo", "train", *self._what()]

    def rank_words(self) -> list[str]:
        """Return the arguments of `python -m` for each training task of Slurm."""
        return ["megatron_prepo.launch.rank", *self._where(), *self._what()]

    def server_words(self) -> list[str]:
        """Return the arguments of `python -m` for the task of each server node."""
        return ["megatron_prepo.launch.servers", *self._where(), *self._what()]

    def _where(self) -> list[str]:
        if not self.starts_servers:
            return []
        return [f"--servers-a-node={self.servers_a_node}", f"--server-nodes={self.server_nodes}"]

    def _what(self) -> list[str]:
        path, here = self.path.resolve(), Path.cwd()
        inside = path.is_relative_to(here)
        return [os.path.relpath(path, here) if inside else str(path), *self.overrides]


def make_job(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    nodes: int | None = None,
    gpus_per_node: int = 8,
    server_nodes: int = 0,
) -> Job:
    """Return the job of a recipe or a file.

    Without `nodes`, the number of nodes is derived from the ranks of the configured layout; with
    it, `parallel.data` is derived from the nodes unless an override sets it.  Raises UserError for
    a layout that does not fit the nodes, or servers that do not fit a node.
    """
    path = recipes.find(recipe)
    config = configuration.load(path, overrides)
    check_name(config.reward.function)
    if nodes is None:
        ranks = config.parallel.num_ranks
        gpus_per_node = min(gpus_per_node, ranks)
        nodes = -(-ranks // gpus_per_node)
    elif not any(override.startswith("parallel.data=") for override in overrides):
        overrides = (
            f"parallel.data={max(1, nodes * gpus_per_node // config.parallel.replica)}",
            *overrides,
        )
        config = configuration.load(path, overrides)
    job = Job(path, tuple(overrides), config, nodes, gpus_per_node, server_nodes)
    check(job)
    return job


def check(job: Job) -> None:
    """Raise UserError for a job that cannot run on its nodes."""
    from megatron_prepo.actor.parallel import check_world_size

    for name in ("nodes", "gpus_per_node", "server_nodes"):
        least = 0 if name == "server_nodes" else 1
        if getattr(job, name) < least:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(job, name)} must be at least {least}")
    check_world_size(job.config.parallel, job.ranks)
    servers = job.config.servers
    if job.server_nodes and (job.config.rollout.engine != "sglang" or servers.urls):
        raise UserError(
            f"--server-nodes {job.server_nodes} is for SGLang servers of the job: set "
            "rollout.engine=sglang and leave servers.urls empty, or remove the option"
        )
    if job.starts_servers and job.gpus_per_node % servers.tensor:
        raise UserError(
            f"servers.tensor={servers.tensor} does not divide the {job.gpus_per_node} GPUs per "
            "node; choose a divisor"
        )
    shared = job.starts_servers and not job.server_nodes
    if shared and job.config.weight_sync.transport == "distributed":
        raise UserError(
            "weight_sync.transport=distributed needs servers on separate GPUs: add "
            "--server-nodes, or choose value or disk"
        )


def local(job: Job) -> Job:
    """Return the same job on this machine: all ranks on one node."""
    return dataclasses.replace(job, nodes=1, gpus_per_node=job.ranks)
