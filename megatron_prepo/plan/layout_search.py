"""Layouts that a model and a number of GPUs allow, best first.

Every division of the GPUs into tensor (within a machine), pipeline, expert and data parallelism is
tried with the configuration's context parallelism, with its micro-batch size and with the smallest
one, as configured and with full recomputation; a pipeline also in chunks, if they save 1 % or more.
The distributed optimizer is always used, and sequence parallelism whenever there is tensor
parallelism.  Layouts that fit are ordered by seconds of scoring and the update: published rates,
idle time of the pipeline, a third more arithmetic of the update for recomputation, and least
communication (`step_time`).  This is a ranking, not a measurement.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prepo.config import Config, ParallelConfig, from_tree, to_tree
from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.shape import Shape
from megatron_prepo.plan import engine_plan, step_time
from megatron_prepo.plan import planner as plan
from megatron_prepo.plan.engine_plan import EnginePlan
from megatron_prepo.plan.gpus import GPUS
from megatron_prepo.plan.memory import exchanged_numbers
from megatron_prepo.plan.planner import (
    ParameterCounts,
    PlanRequest,
    RankMemory,
    data_ranks,
    longest,
    mean_tokens,
    num_micro_batches,
)

RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}

CHUNKS = (1, 2, 4)
"""Model chunks per pipeline rank that are tried.  More chunks save little idle time and have costs
that are not counted here: smaller kernels and more messages."""
WORTH = 0.99
"""More chunks must lower the seconds below this fraction, to outweigh their messages."""


@dataclass(frozen=True)
class Layout:
    """A layout that fits."""

    settings: tuple[str, ...]
    """Overrides of the configuration."""
    total: int
    """Peak bytes of the fullest rank."""
    seconds: float
    """Seconds per step of scoring and the update, by which layouts are ordered."""


@dataclass(frozen=True)
class _Parts:
    """Parameters per rank: of the embedding, and of a layer without and within its experts."""

    embedding: int
    layer: int
    experts: int
    """0 if expert=1: experts are then divided like any MLP, and counted in `layer`."""
    gradient_bytes: int
    adapters: int = 0
    """Of a layer; the other parameters are then frozen."""


def suggest(config: Config, request: PlanRequest, *, most: int = 5) -> list[Layout]:
    """Return the best layouts that fit, with the best variant per tensor, pipeline, expert size."""
    hf = read_hf_config(config.model.hf)
    shape = Shape.of(hf)
    config = plan.as_requested(config, request)
    best: dict[tuple[int, int, int], Layout] = {}
    parts: dict[tuple[int, int], _Parts] = {}
    for variant in _variants(config, hf, request):
        parallel = variant.parallel
        sizes = (parallel.tensor, parallel.expert)
        if sizes not in parts:
            parts[sizes] = _parts(variant, hf)
        layout = _evaluate(variant, config, request, hf, shape, parts[sizes])
        key = (parallel.tensor, parallel.pipeline, parallel.expert)
        worth = WORTH if parallel.virtual_pipeline > 1 else 1.0
        if layout and (key not in best or layout.seconds < worth * best[key].seconds):
            best[key] = layout
    return sorted(best.values(), key=lambda layout: (layout.seconds, layout.total))[:most]


def _variants(config: Config, hf: dict[str, Any], request: PlanRequest) -> Iterator[Config]:
    from megatron_prepo.actor.model import check_layout

    tree = to_tree(config)
    uneven = [name for name in config.megatron if name.startswith("num_layers_in_")]
    megatron = {name: value for name, value in config.megatron.items() if name not in uneven}
    micro_batches = dict.fromkeys((config.train.micro_batch_tokens, longest(config)))
    context = config.parallel.context
    sizes = _sizes(config.parallel.num_ranks, context, hf["num_hidden_layers"], Shape.of(hf))
    for tensor, pipeline, expert in sizes:
        parallel = {
            "tensor": tensor,
            "pipeline": pipeline,
            "expert": expert,
            "data": config.parallel.num_ranks // (tensor * pipeline * context),
            "sequence": tensor > 1,
        }
        # the first of equal variants wins
        for size, recompute, chunks in itertools.product(
            micro_batches, (megatron, megatron | RECOMPUTE), CHUNKS if pipeline > 1 else (1,)
        ):
            changed = {
                "parallel": tree["parallel"] | parallel | {"virtual_pipeline": chunks},
                "train": tree["train"] | {"micro_batch_tokens": size},
                "optimizer": tree["optimizer"] | {"use_distributed_optimizer": True},
                "megatron": recompute,
            }
            try:
                variant = from_tree(tree | changed)
                check_layout(variant, hf)
            except UserError:  # not a valid layout
                continue
            yield variant


def _sizes(gpus: int, context: int, layers: int, shape: Shape) -> Iterator[tuple[int, int, int]]:
    for tensor in (1, 2, 4, 8):
        for pipeline in range(1, min(layers, gpus // (tensor * context)) + 1):
            if gpus % (tensor * context * pipeline) or layers % pipeline:
                continue
            expert = 1
            while expert <= min(max(1, shape.experts), gpus // pipeline):
                yield tensor, pipeline, expert
                expert *= 2


def _parts(config: Config, hf: dict[str, Any]) -> _Parts:
    """Count the parts in Megatron's model of one layer; all layers are alike."""
    from megatron_prepo.actor.dry_run import each_stage
    from megatron_prepo.actor.optimizer import ddp_config

    one_layer = hf | {"num_hidden_layers": 1, "tie_word_embeddings": True}
    parallel = dataclasses.replace(config.parallel, pipeline=1, virtual_pipeline=1, data=None)
    (stage,) = each_stage(
        one_layer,
        config.model,
        parallel,
        ddp_config(config.optimizer, config.megatron),
        world_size=parallel.num_ranks,
        lora=config.lora,
    )
    adapters = stage.trained if config.lora.rank else 0
    tensor = config.parallel.tensor
    embedding = -(-hf["vocab_size"] // tensor) * hf["hidden_size"]
    experts = sum(buffer.numel for buffer in stage.buffers if buffer.experts)
    return _Parts(
        embedding=embedding,
        layer=stage.parameters - adapters - experts - embedding - hf["hidden_size"],
        experts=experts,
        gradient_bytes=stage.buffers[0].gradient_bytes,
        adapters=adapters,
    )


def _evaluate(
    config: Config,
    original: Config,
    request: PlanRequest,
    hf: dict[str, Any],
    shape: Shape,
    parts: _Parts,
) -> Layout | None:
    """Return the layout if it fits."""
    ranks, engine = _ranks(config, request, hf, shape, parts)
    fullest = max(rank.total for rank in ranks)
    gpu = GPUS[request.gpu]
    if fullest + request.reserve > gpu.memory or not engine.sequences_at_once:
        return None
    return Layout(
        _overrides(original, config),
        fullest,
        _seconds(config, request, shape, parts, ranks),
    )


def _ranks(
    config: Config, request: PlanRequest, hf: dict[str, Any], shape: Shape, parts: _Parts
) -> tuple[tuple[RankMemory, ...], EnginePlan]:
    """Return first, middle and last stage, composed of the parts, and the engine."""
    parallel = config.parallel
    replicas = data_ranks(parallel) * parallel.context  # of a weight outside the experts
    expert_ranks = replicas * parallel.tensor // (parallel.expert * parallel.expert_tensor)
    layers = shape.layers // parallel.pipeline
    tied = bool(hf.get("tie_word_embeddings"))

    def held(stage: int) -> ParameterCounts:
        dense = layers * parts.layer
        if stage == 0:
            dense += parts.embedding
        if stage == parallel.pipeline - 1:
            dense += shape.hidden + (parts.embedding if stage or not tied else 0)
        if parts.adapters:  # a mixture of experts has none
            trained = layers * parts.adapters
            shard = trained / replicas
            return ParameterCounts(trained, trained, shard, parts.gradient_bytes, dense)
        experts = layers * parts.experts
        shard = dense / replicas + experts / expert_ranks
        return ParameterCounts(dense + experts, dense + experts, shard, parts.gradient_bytes)

    parameters = _num_parameters(parallel, shape, parts, tied)
    engine = engine_plan.plan_engine(config, plan.placed(config, request), shape, parameters)
    stages = sorted({0, parallel.pipeline // 2, parallel.pipeline - 1})
    ranks = tuple(
        plan.rank_memory(config, request, shape, engine, stage, layers, held(stage))
        for stage in stages
    )
    return ranks, plan.with_room(config, request, shape, engine, ranks)


def _num_parameters(parallel: ParallelConfig, shape: Shape, parts: _Parts, tied: bool) -> int:
    """Return about all parameters: norms count as if they were divided over tensor ranks."""
    dense = shape.layers * parts.layer + (1 if tied else 2) * parts.embedding
    spread = parallel.expert * parallel.expert_tensor
    return parallel.tensor * dense + spread * shape.layers * parts.experts


def _seconds(
    config: Config,
    request: PlanRequest,
    shape: Shape,
    parts: _Parts,
    ranks: Sequence[RankMemory],
) -> float:
    parallel, gpu = config.parallel, GPUS[request.gpu]
    data = data_ranks(parallel) * parallel.context
    runs = plan.reference_runs(request, shape)
    parameters = _num_parameters(parallel, shape, parts, tied=False)
    rollouts = config.selection.num_selected * config.rollout.samples_per_prompt
    sequence = sum(mean_tokens(config, request))
    tokens = round(rollouts * sequence)
    full = config.megatron.get("recompute_granularity") == "full"
    slow = max(
        1 / run.rate("old_logprobs") + (4 / 3 if full else 1) / run.rate("update") for run in runs
    )
    busy = (parameters - shape.idle_parameters) * tokens * slow / config.parallel.num_ranks
    chunks = parallel.virtual_pipeline
    busy *= step_time.bubble(parallel.pipeline, num_micro_batches(config, sequence), chunks)
    return busy + step_time.communication_seconds(
        gpu=gpu,
        tensor=parallel.tensor,
        data=data,
        pipeline=parallel.pipeline,
        chunks=chunks,
        context=parallel.context,
        layers=shape.layers // parallel.pipeline,
        hidden=shape.hidden,
        tokens=tokens // data,
        exchanged=exchanged_numbers(shape, parallel),
        gradient_bytes=config.train.mini_batches * max(rank.gradients for rank in ranks),
    )


def _overrides(original: Config, config: Config) -> tuple[str, ...]:
    """Return the settings that differ, as overrides to paste."""
    before, after = to_tree(original), to_tree(config)
    words = [
        f"{section}.{name}={str(value).lower()}"
        for section in ("parallel", "train", "optimizer", "megatron")
        for name, value in after[section].items()
        if before[section].get(name) != value
    ]
    gone = [name for name in before["megatron"] if name not in after["megatron"]]
    return (*words, *(f"megatron.{name}=" for name in gone))
