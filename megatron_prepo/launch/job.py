"""Command lines of a job on its nodes, independent of NeMo-Run.

What runs on which node is `rollout.placement`'s answer.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prepo import config as configuration
from megatron_prepo.config import Config
from megatron_prepo.errors import UserError
from megatron_prepo.launch import recipes
from megatron_prepo.rewards import check_name
from megatron_prepo.rollout.placement import GPUS_PER_NODE, Placement, check_transport, place


@dataclass(frozen=True)
class Job:
    """A run and where it runs."""

    path: Path
    overrides: tuple[str, ...]
    config: Config
    place: Placement

    @property
    def name(self) -> str:
        """Name of the job, such as `qwen2.5-7b-prepo`."""
        return f"{self.path.parent.name}-{self.path.stem}"

    @property
    def nodes(self) -> int:
        """All nodes of the job."""
        return self.place.nodes + self.place.server_nodes

    @property
    def starts_servers(self) -> bool:
        """Whether the job starts the SGLang servers, instead of the run or the user."""
        return self.place.started_by == "job"

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
        return [
            f"--servers-a-node={self.place.servers_per_node}",
            f"--server-nodes={self.place.server_nodes}",
        ]

    def _what(self) -> list[str]:
        path, here = self.path.resolve(), Path.cwd()
        inside = path.is_relative_to(here)
        return [os.path.relpath(path, here) if inside else str(path), *self.overrides]


def make_job(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    nodes: int | None = None,
    gpus_per_node: int = GPUS_PER_NODE,
    server_nodes: int | None = None,
) -> Job:
    """Return the job of a recipe or a file.

    Without `nodes`, the number of nodes is derived from the ranks of the configured layout; with
    it, `parallel.data` is derived from the nodes unless an override sets it.  Raises UserError for
    a layout that does not fit the nodes, or servers that do not fit a node.
    """
    from megatron_prepo.actor.parallel import check_world_size

    for option, value, least in (
        ("--nodes", nodes, 1),
        ("--gpus-per-node", gpus_per_node, 1),
        ("--server-nodes", server_nodes, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{option} {value} must be at least {least}")
    path = recipes.find(recipe)
    if server_nodes is not None:
        overrides = (*overrides, f"servers.nodes={server_nodes}")  # the option decides
    config = configuration.load(path, overrides)
    check_name(config.reward.function)
    if nodes and not any(override.startswith("parallel.data=") for override in overrides):
        data = max(1, nodes * gpus_per_node // config.parallel.replica)
        overrides = (f"parallel.data={data}", *overrides)
        config = configuration.load(path, overrides)
    where = place(config, nodes=nodes, gpus_per_node=gpus_per_node)
    check_world_size(config.parallel, where.ranks)
    check_transport(config.weight_sync.transport, where)
    return Job(path, tuple(overrides), config, where)
