"""The engines of a plan: their weights, the memory they hold, and how many rollouts fit in it."""

import dataclasses
import math
from dataclasses import dataclass

from megatron_prepo.config import Config
from megatron_prepo.errors import UserError
from megatron_prepo.models.shape import Shape
from megatron_prepo.plan.gpus import Gpu
from megatron_prepo.plan.memory import kv_bytes_per_token
from megatron_prepo.rollout.placement import Placement

FRACTION = "mem_fraction_static"
"""SGLang's setting of the share of a GPU's memory that weights and key-value cache take."""


@dataclass(frozen=True)
class EnginePlan:
    """The engines of a run."""

    name: str
    """`embedded` or `sglang`."""
    count: int
    tensor: int
    """GPUs per engine."""
    shared: bool
    """Whether they use GPUs of ranks."""
    counted: bool
    """Whether their GPUs are GPUs of the job; those of `servers.urls` are not."""
    weights: int
    """Bytes of weights per GPU."""
    fraction: float | None
    """`sglang.mem_fraction_static`."""
    releases: bool
    """Whether the key-value cache is released to the actor between rollouts."""
    sequences_wanted: int
    """Rollouts per step and engine."""
    sequences_at_once: int
    """Number of these that the key-value cache holds at their maximum length."""


def plan_engine(config: Config, where: Placement, shape: Shape, parameters: int) -> EnginePlan:
    """Return the engines that are placed; `with_room` adds the capacity of their caches."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    rollouts = config.selection.num_selected * config.rollout.samples_per_prompt
    wanted = math.ceil(rollouts / where.engines)
    embedded = where.started_by == "ranks"
    if shape.heads % where.tensor:
        raise UserError(
            f"servers.tensor={where.tensor} (--engine-tensor) does not divide the model's "
            f"{shape.heads} heads; choose a divisor"
        )
    return EnginePlan(
        name=config.rollout.engine,
        count=where.engines,
        tensor=where.tensor,
        shared=where.shared,
        counted=where.started_by != "user",
        weights=parameters * width // where.tensor,
        fraction=None if embedded else config.sglang.get(FRACTION),
        releases=embedded or config.servers.release_memory,
        sequences_wanted=wanted,
        sequences_at_once=min(wanted, config.rollout.batch_size) if embedded else wanted,
    )


def cache_bytes(engine: EnginePlan, gpu: Gpu, sequence_bytes: int) -> int:
    """Return the bytes of the cache that an engine holds on a GPU of a rank.

    Without a fraction, SGLang's is counted as one sequence of the maximum length.
    """
    if not engine.shared:
        return 0
    if engine.name == "embedded":
        return engine.sequences_at_once * sequence_bytes
    if engine.fraction is None:
        return sequence_bytes
    return max(0, round(engine.fraction * gpu.memory) - engine.weights)


def with_room(engine: EnginePlan, gpu: Gpu, sequence_bytes: int, held: int) -> EnginePlan:
    """Set `sequences_at_once` of SGLang: its cache is what the fraction leaves beside weights.

    Without a fraction, it is the GPU's memory less `held`, the bytes reserved and held by the
    fullest rank, if it has the GPU of one.
    """
    if engine.name == "embedded" or not engine.counted:
        return engine
    room = gpu.memory - held - engine.weights
    if engine.fraction is not None:
        room = round(engine.fraction * gpu.memory) - engine.weights
    at_once = min(engine.sequences_wanted, max(0, room // sequence_bytes))
    return dataclasses.replace(engine, sequences_at_once=at_once)


def problems(engine: EnginePlan, shape: Shape, gpu: Gpu, held: int) -> tuple[str, ...]:
    """Return why the engines cannot run where they are, with the remedies.

    `held`: most bytes that are reserved and held by a rank while the engine has its cache.
    """
    if engine.name == "embedded" or not engine.counted:
        return ()
    found = []
    if engine.shared and engine.fraction is None:
        most = math.floor(100 * (gpu.memory - held) / gpu.memory) / 100
        found.append(
            f"sglang.{FRACTION} is empty, and SGLang then takes most of each GPU, which it shares "
            f"with a rank: set it to at most {most:.2f}, which the ranks leave"
        )
    if not engine.sequences_at_once:
        tensor = _smallest_tensor(engine, shape, gpu)
        raise_tensor = "" if tensor in (None, engine.tensor) else f"; servers.tensor={tensor}?"
        found.append(
            f"the engine's cache cannot hold one sequence beside weights of "
            f"{engine.weights / 2**30:.1f} GiB per GPU (servers.tensor={engine.tensor})"
            + raise_tensor
        )
    return tuple(found)


def _smallest_tensor(engine: EnginePlan, shape: Shape, gpu: Gpu) -> int | None:
    """Return the fewest GPUs per engine whose weights take at most a third of the memory."""
    whole = engine.weights * engine.tensor
    sizes = (n for n in (1, 2, 4, 8, 16) if shape.heads % n == 0)
    return next((n for n in sizes if whole / n <= gpu.memory / 3), None)


def sequence_bytes(shape: Shape, tensor: int, tokens: int) -> int:
    """Return the bytes of a sequence in the cache of one GPU."""
    return tokens * kv_bytes_per_token(shape, tensor=tensor)
