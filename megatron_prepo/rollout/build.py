"""Construction of the configured engine; the only module that imports the engines' classes."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prepo.config import Config, ServersConfig
from megatron_prepo.errors import UserError
from megatron_prepo.rollout import placement
from megatron_prepo.rollout.engine import Engine, Tokenizer, result_here
from megatron_prepo.rollout.sglang import launch, open_files
from megatron_prepo.rollout.sglang.engine import SGLangEngine
from megatron_prepo.rollout.stopping import Stops
from megatron_prepo.rollout.transformers_engine import EmbeddedEngine


@dataclass(frozen=True)
class Ranks:
    """The ranks that an engine serves, and the collectives with which they share results."""

    rank: int = 0
    num_ranks: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """Return every rank's value on every rank."""
    share: Callable[[Future[Any] | None], Any] = result_here
    """Return the result of rank 0's future on every rank; ranks other than 0 pass None."""


ONE_RANK = Ranks()


def check(config: Config) -> None:
    """Raise UserError unless what the configured engine needs is installed, free and allowed."""
    if config.rollout.engine != "sglang":
        return
    check_servers_nodes(config.servers)
    gpus = torch.cuda.device_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.num_ranks))
    count = placement.servers_here(config.servers, cuda=gpus > 0, ranks=ranks)
    open_files.make_room(config.servers, len(config.servers.urls) or count)
    launch.check_given(config.servers) if config.servers.urls else launch.check(config)
    if not config.servers.urls and os.environ.get("RANK", "0") == "0":
        launch.check_host(config.servers)
        if gpus:
            placement.servers_per_node(config.servers, ranks=min(ranks, gpus), gpus=gpus)


def check_servers_nodes(servers: ServersConfig) -> None:
    """Raise UserError for a run that would need servers which only a job starts."""
    if servers.nodes:
        raise UserError(
            f"servers.nodes={servers.nodes} is for jobs that start servers: launch this "
            "configuration by --executor slurm, list running servers in servers.urls and set "
            "servers.nodes=0, or let the run start them with servers.nodes=0"
        )


def build_engine(
    config: Config,
    tokenizer: Tokenizer,
    *,
    device: torch.device,
    ranks: Ranks = ONE_RANK,
    log: Callable[[str], None] = print,
) -> Engine:
    """Return the engine that `rollout.engine` names; its weights are loaded later."""
    if config.rollout.engine == "sglang":
        return SGLangEngine(
            config,
            tokenizer,
            device=device,
            rank=ranks.rank,
            share=ranks.share,
            gather=ranks.gather,
            log=log,
        )
    return EmbeddedEngine(
        config.model.hf,
        tokenizer,
        stops=Stops.of(config.rollout, config.model.hf, tokenizer),
        dtype=getattr(torch, config.model.dtype),
        fp32_lm_head=config.model.fp32_lm_head,
        device=device,
        batch_size=config.rollout.batch_size,
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
        gather=ranks.gather,
    )
