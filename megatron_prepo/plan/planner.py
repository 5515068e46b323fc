"""Predict memory per rank and seconds per step of a run on a cluster, without its GPUs.

    megatron-prepo plan CONFIG --gpus 64 --gpu h100 [key=value ...]

Parameters and buffers are Megatron-Core's own: each pipeline stage of the real model is built on
the meta device (`actor.dry_run`).  Activations, output head and key-value cache are formulas
(`memory`), seconds follow from published or measured rates (`step_time`, `measured_rates`); each
names its source.  Only `config.json` of the model is read.

Bytes per parameter of a rank that Megatron-Core keeps for bfloat16 weights and Adam:

    weights    2
    gradients  4, accumulated in float32
    Adam       12: float32 weights and two moments; with the distributed optimizer, divided by the
               data-parallel ranks (experts: by those that hold the same experts); for the offloaded
               fraction, 16 in host memory instead (which includes the gradients)
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_prepo.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    from_tree,
    to_tree,
)
from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.shape import Shape
from megatron_prepo.plan import step_time
from megatron_prepo.plan.gpus import GIB, GPUS, GPUS_PER_MACHINE, Gpu
from megatron_prepo.plan.memory import Layers, head_workspace, kv_bytes_per_token, stage_activations
from megatron_prepo.plan.step_time import MeasuredRates, ReferenceRun

if TYPE_CHECKING:
    from megatron_prepo.actor.dry_run import Stage

ENGINES = ("embedded", "sglang", "elsewhere")
RESERVE = 6 * GIB
"""Bytes reserved on every GPU for the CUDA context, communication buffers, temporaries and
fragmentation: our guess, to be replaced by a measurement."""


@dataclass(frozen=True)
class PlanRequest:
    """What a plan depends on in addition to the configuration."""

    gpus: int
    gpu: str = "h100"
    engine: str | None = None
    """`embedded`, `sglang`, or `elsewhere` for servers on GPUs that are not counted; default:
    `rollout.engine`."""
    engine_tensor: int | None = None
    """GPUs per SGLang engine; default: the fewest whose weights take at most half of the memory."""
    prompt_tokens: float | None = None
    """Mean tokens of a prompt; default: the maximum, `data.max_prompt_tokens`."""
    response_tokens: float | None = None
    """Mean tokens of a completion; default: the maximum, `rollout.max_new_tokens`."""
    reserve: int = RESERVE
    rates: MeasuredRates | None = None
    """Rates of a run of the user's; default: published ones."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UserError(f"--gpus {self.gpus} must be at least 1")
        if self.gpu not in GPUS:
            raise UserError(f"--gpu {self.gpu!r} is not one of {', '.join(GPUS)}")
        if self.engine not in (None, *ENGINES):
            raise UserError(f"--engine {self.engine!r} is not one of {', '.join(ENGINES)}")


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a rank, as Megatron-Core's buffers hold them."""

    parameters: int
    padded: int
    """Parameters with the padding of the distributed optimizer."""
    shard: float
    """Parameters whose optimizer state a rank keeps under the distributed optimizer."""
    gradient_bytes: int


@dataclass(frozen=True)
class RankMemory:
    """Bytes of each rank of one pipeline stage."""

    stage: int
    layers: int
    parameters: int
    weights: int
    gradients: int
    optimizer_split: int
    """Adam's state with the distributed optimizer."""
    optimizer_whole: int
    """Adam's state without it."""
    optimizer_host: int
    """Bytes in host memory under `megatron.optimizer_cpu_offload`."""
    reference: int
    """Copies of the weights for a KL penalty."""
    activations: int
    head: int
    engine_weights: int
    kv_cache: int
    """The engine's minimum: its complete batch (embedded), or one longest sequence (SGLang)."""
    distributed: bool
    """Whether `optimizer.use_distributed_optimizer` is set."""

    @property
    def actor(self) -> int:
        """Bytes that the actor holds at all times."""
        optimizer = self.optimizer_split if self.distributed else self.optimizer_whole
        return self.weights + self.gradients + optimizer + self.reference

    @property
    def total(self) -> int:
        """Peak bytes: the update and generation alternate, and both sets of weights stay."""
        return self.actor + self.engine_weights + max(self.activations + self.head, self.kv_cache)


@dataclass(frozen=True)
class EnginePlan:
    """The engine on the same GPUs."""

    name: str
    tensor: int
    weights: int
    """Bytes of weights per GPU."""
    sequences_wanted: int
    """Rollouts per step and engine."""
    sequences_at_once: int
    """Number of these that the key-value cache holds at their maximum length."""


@dataclass(frozen=True)
class Plan:
    """Predicted memory and time of a run."""

    model: str
    parameters: int
    active_parameters: int
    gpus: int
    gpu: str
    memory: int
    reserve: int
    layout: dict[str, int | bool]
    divisions: tuple[str, ...]
    cautions: tuple[str, ...]
    ranks: tuple[RankMemory, ...]
    engine: EnginePlan
    micro_batches: int
    sequence_tokens: int
    token_budget: int
    seconds: dict[str, tuple[float, float]]
    rates: tuple[str, ...]
    steps: int
    rollouts: tuple[int, int]
    gpu_hours: tuple[float, float]

    @property
    def fits(self) -> bool:
        """Whether every rank fits in the GPU's memory minus the reserve."""
        most = max(rank.total for rank in self.ranks)
        return most + self.reserve <= self.memory and self.engine.sequences_at_once > 0


def make_plan(config: Config, request: PlanRequest) -> Plan:
    """Build the model without memory and predict; UserError for an impossible layout."""
    from megatron_prepo.actor.dry_run import count_parameters, each_stage
    from megatron_prepo.actor.optimizer import ddp_config

    hf = read_hf_config(config.model.hf)
    shape = Shape.of(hf)
    divisions = check(config, hf)
    config = with_data(config, request.gpus)
    stages = list(
        each_stage(
            hf,
            config.model,
            config.parallel,
            ddp_config(config.optimizer, config.megatron),
            config.megatron,
            world_size=request.gpus,
        )
    )
    parameters = count_parameters(hf, stages)
    engine = plan_engine(config, request, shape, parameters)
    ranks = tuple(
        rank_memory(config, shape, engine, stage.stage, stage.layers, _parameter_counts(stage))
        for stage in stages
    )
    engine = with_room(config, request, shape, engine, ranks)
    active = parameters - shape.idle_parameters
    work = _work(config, request, parameters, active)
    seconds = step_time.predict_seconds(
        work, gpu=GPUS[request.gpu], gpus=request.gpus, runs=reference_runs(request, shape)
    )
    least, most = rollouts_per_step(config)
    gpu_hours = _gpu_hours(config.train, request.gpus, seconds, least, most)
    seconds["rollouts"] = (seconds["rollouts"][0], seconds["rollouts"][1] * most / least)
    return Plan(
        model=config.model.hf,
        parameters=parameters,
        active_parameters=active,
        gpus=request.gpus,
        gpu=request.gpu,
        memory=GPUS[request.gpu].memory,
        reserve=request.reserve,
        layout=layout_sizes(config.parallel),
        divisions=divisions,
        cautions=_cautions(config, hf),
        ranks=ranks,
        engine=engine,
        micro_batches=num_micro_batches(config),
        sequence_tokens=longest(config),
        token_budget=config.train.micro_batch_tokens,
        seconds=seconds,
        rates=tuple(run.source for run in reference_runs(request, shape)),
        steps=config.train.total_steps,
        rollouts=(_until_budget(config.train, least), _until_budget(config.train, most)),
        gpu_hours=gpu_hours,
    )


def reference_runs(request: PlanRequest, shape: Shape) -> tuple[ReferenceRun, ...]:
    """Return the runs whose rates predict: the given one, or published ones of such models."""
    return (request.rates,) if request.rates else step_time.published(bool(shape.experts))


def with_data(config: Config, gpus: int) -> Config:
    """Return the configuration with `parallel.data` for this number of GPUs, checked again."""
    from megatron_prepo.actor.parallel import check_world_size

    check_world_size(config.parallel, gpus)
    data = gpus // config.parallel.replica
    tree = to_tree(config)
    return from_tree(tree | {"parallel": tree["parallel"] | {"data": data}})


def check(config: Config, hf: dict[str, Any]) -> tuple[str, ...]:
    """Return how the layout divides the model; UserError for the first size that does not fit."""
    from megatron_prepo.actor.model import check_layout

    check_layout(config, hf)
    shape, parallel = Shape.of(hf), config.parallel
    if longest(config) > hf["max_position_embeddings"]:
        raise UserError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} and rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} exceed the model's "
            f"{hf['max_position_embeddings']} positions; lower one of them"
        )
    tensor = parallel.tensor
    padding = -shape.vocabulary % tensor
    divisions = [
        f"{shape.heads} heads, {shape.groups} key-value heads, MLP {hf['intermediate_size']:,} "
        f"over tensor {tensor}"
        + (f" x context {parallel.context} (heads only)" if parallel.context > 1 else ""),
        f"vocabulary {shape.vocabulary:,} + {padding} rows of padding over tensor {tensor}",
        f"{shape.layers} layers over pipeline {parallel.pipeline}"
        + (f" x {parallel.virtual_pipeline} chunks" if parallel.virtual_size else ""),
    ]
    if shape.experts:
        divisions.append(f"{shape.experts} experts over expert {parallel.expert}")
    return tuple(divisions)


def _cautions(config: Config, hf: dict[str, Any]) -> tuple[str, ...]:
    parallel = config.parallel
    cautions: list[str] = []
    rollouts = config.selection.num_selected * config.rollout.samples_per_prompt
    if parallel.tensor > GPUS_PER_MACHINE:
        cautions.append(
            f"parallel.tensor={parallel.tensor} spans machines of {GPUS_PER_MACHINE} GPUs, between "
            "which its all-reduces are slow"
        )
    elif parallel.context > 1 and parallel.tensor * parallel.context > GPUS_PER_MACHINE:
        cautions.append(
            f"parallel.tensor={parallel.tensor} x parallel.context={parallel.context} spans "
            f"machines of {GPUS_PER_MACHINE} GPUs, between which exchanging heads is slow"
        )
    if rollouts % (data_ranks(parallel) * config.train.mini_batches):
        cautions.append(
            f"{rollouts} rollouts per step are not a multiple of parallel.data={parallel.data} x "
            f"train.mini_batches={config.train.mini_batches}: some ranks idle"
        )
    if num_micro_batches(config) < parallel.pipeline:
        cautions.append(
            f"{num_micro_batches(config)} micro-batches leave a pipeline of {parallel.pipeline} "
            "mostly idle; lower train.micro_batch_tokens or parallel.pipeline"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        cautions.append("parallel.sequence=true would divide more activations at no cost")
    groups = hf.get("num_key_value_heads") or hf["num_attention_heads"]
    if parallel.tensor > groups:
        cautions.append(f"{groups} key-value heads are replicated over the tensor ranks")
    return tuple(cautions)


def layout_sizes(parallel: ParallelConfig) -> dict[str, int | bool]:
    """Return the layout's sizes by the names of the section `parallel`."""
    names = ("tensor", "pipeline", "context", "data", "expert", "sequence")
    return {name: getattr(parallel, name) for name in names}


def data_ranks(parallel: ParallelConfig) -> int:
    """Return the data-parallel size of a configuration that `with_data` made."""
    assert parallel.data is not None, "with_data sets it"
    return parallel.data


def longest(config: Config) -> int:
    """Return the tokens of the longest sequence that the settings allow."""
    return config.data.max_prompt_tokens + config.rollout.max_new_tokens


def num_micro_batches(config: Config) -> int:
    """Return the micro-batches per data-parallel rank and update, if all sequences are longest."""
    train = config.train
    rollouts = config.selection.num_selected * config.rollout.samples_per_prompt
    per_rank = -(-rollouts // (train.mini_batches * data_ranks(config.parallel)))
    needed = -(-per_rank // (train.micro_batch_tokens // longest(config)))
    return needed + (-needed % config.parallel.pipeline if config.parallel.virtual_size else 0)


def in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    """Return the most micro-batches, per model chunk, whose activations a stage keeps at a time.

    1F1B begins with one per later stage; interleaved, with two per later stage and all chunks but
    one of a round in addition (arXiv 2104.04473, section 2.2.2).
    """
    later = parallel.pipeline - stage - 1
    chunks = parallel.virtual_pipeline
    if chunks == 1:
        return min(later + 1, micro_batches)
    return min(2 * later + (chunks - 1) * parallel.pipeline + 1, micro_batches * chunks)


def rollouts_per_step(config: Config) -> tuple[int, int]:
    """Return the least and the most; a method that refills uses between K and P groups."""
    from megatron_prepo.selection import load

    selection, method = config.selection, load(config.selection.method)
    least = most = selection.num_selected
    if method.refills:
        most = selection.num_candidates
    if method.needs_pass_rates:
        least = most = selection.num_selected + selection.num_candidates
    group = config.rollout.samples_per_prompt
    return least * group, most * group


def rank_memory(
    config: Config, shape: Shape, engine: EnginePlan, stage: int, layers: int, held: ParameterCounts
) -> RankMemory:
    """Return all bytes of a rank of a pipeline stage."""
    from megatron_prepo.actor.cpu_offload import offload_fraction

    parallel, on_host = config.parallel, offload_fraction(config.megatron)
    split = config.optimizer.use_distributed_optimizer
    width = 2 if config.model.dtype == "bfloat16" else 4
    # Adam's two moments, and float32 weights if the model's are shorter
    state = 12 if config.model.dtype == "bfloat16" else 8
    last = stage == parallel.pipeline - 1
    # the embedded engine's batch, one sequence of SGLang's, or nothing
    at_once = {"embedded": engine.sequences_at_once, "sglang": 1, "elsewhere": 0}[engine.name]
    return RankMemory(
        stage=stage,
        layers=layers,
        parameters=held.parameters,
        weights=(held.padded if split else held.parameters) * width,
        gradients=(held.padded if split else held.parameters) * held.gradient_bytes,
        optimizer_split=round((1 - on_host) * held.shard * state),
        optimizer_whole=held.parameters * state,
        # moments, float32 weights whatever the model's type, and gradients in transfer
        optimizer_host=round(on_host * held.shard * 16),
        # the initial policy, and space for the current one while the initial one scores
        reference=2 * held.parameters * width if config.loss.kl_coef else 0,
        activations=round(
            stage_activations(
                shape,
                parallel,
                layer_kind(config.model),
                config.megatron,
                num_layers=layers // parallel.virtual_pipeline,
                in_flight=in_flight(parallel, stage, num_micro_batches(config)),
                tokens=config.train.micro_batch_tokens,
            )
        ),
        head=head_bytes(config, shape) if last else 0,
        engine_weights=engine.weights,
        kv_cache=at_once * longest(config) * kv_bytes_per_token(shape, tensor=engine.tensor),
        distributed=split,
    )


def layer_kind(model: ModelConfig) -> Layers:
    """Return the layers whose activations are counted: torch-native for `auto`, which keep more."""
    return "te" if model.layers == "te" else "torch"


def head_bytes(config: Config, shape: Shape) -> int:
    """Return the bytes of the output head's workspace on a GPU, by the section `loss`."""
    import torch

    from megatron_prepo.actor.lm_head import HEAD_MEMORY_MIB, chunk_tokens_within

    rows = -(-shape.vocabulary // config.parallel.tensor)
    weight = torch.empty(rows, 1, dtype=torch.bfloat16, device="meta")
    memory_mib = config.loss.head_memory_mib or HEAD_MEMORY_MIB["cuda"]
    return round(
        head_workspace(
            shape,
            config.parallel,
            chunk_tokens=chunk_tokens_within(memory_mib, weight),
            tokens=config.train.micro_batch_tokens,
        )
    )


def _parameter_counts(stage: "Stage") -> ParameterCounts:
    return ParameterCounts(
        parameters=stage.parameters,
        padded=sum(buffer.padded for buffer in stage.buffers),
        shard=sum(buffer.padded / buffer.ranks for buffer in stage.buffers),
        gradient_bytes=max(buffer.gradient_bytes for buffer in stage.buffers),
    )


def plan_engine(config: Config, request: PlanRequest, shape: Shape, parameters: int) -> EnginePlan:
    """Return the engine on these GPUs; `with_room` adds the capacity of its key-value cache."""
    name = request.engine or config.rollout.engine
    width = 2 if config.model.dtype == "bfloat16" else 4
    rollouts = config.selection.num_selected * config.rollout.samples_per_prompt
    if name == "embedded":
        wanted = -(-rollouts // request.gpus)
        return EnginePlan(
            name, 1, parameters * width, wanted, min(wanted, config.rollout.batch_size)
        )
    if name == "elsewhere":
        return EnginePlan(name, 1, 0, rollouts, rollouts)
    tensor = request.engine_tensor or _smallest_tensor(
        parameters * width, GPUS[request.gpu], request.gpus
    )
    if request.gpus % tensor:
        raise UserError(f"--engine-tensor {tensor} does not divide --gpus {request.gpus}")
    if shape.heads % tensor:
        raise UserError(f"--engine-tensor {tensor} does not divide the model's {shape.heads} heads")
    engines = request.gpus // tensor
    return EnginePlan(name, tensor, parameters * width // tensor, -(-rollouts // engines), 0)


def _smallest_tensor(weights: int, gpu: Gpu, gpus: int) -> int:
    tensor = 1
    while weights / tensor > gpu.memory / 2 and gpus % (2 * tensor) == 0:
        tensor *= 2
    return tensor


def with_room(
    config: Config,
    request: PlanRequest,
    shape: Shape,
    engine: EnginePlan,
    ranks: tuple[RankMemory, ...],
) -> EnginePlan:
    """Set `sequences_at_once`: SGLang's cache uses the memory that is free on the fullest GPU."""
    if engine.name != "sglang":
        return engine
    busiest = max(rank.actor for rank in ranks)
    room = GPUS[request.gpu].memory - request.reserve - busiest - engine.weights
    sequence = longest(config) * kv_bytes_per_token(shape, tensor=engine.tensor)
    at_once = min(engine.sequences_wanted, max(0, room // sequence))
    return dataclasses.replace(engine, sequences_at_once=at_once)


def _work(config: Config, request: PlanRequest, parameters: int, active: int) -> step_time.StepWork:
    from megatron_prepo.selection import load

    selection, group = config.selection, config.rollout.samples_per_prompt
    prompt = request.prompt_tokens or config.data.max_prompt_tokens
    response = request.response_tokens or config.rollout.max_new_tokens
    scored = selection.num_candidates if load(selection.method).needs_scores else 0
    least, _ = rollouts_per_step(config)
    trained = selection.num_selected * group * (prompt + response)
    return step_time.StepWork(
        parameters=parameters,
        active_parameters=active,
        prompt_tokens=scored * prompt,
        generated_tokens=0 if request.engine == "elsewhere" else least * response,
        # with a KL penalty the initial policy scores, too
        scored_tokens=trained * (2 if config.loss.kl_coef else 1),
        trained_tokens=trained,
        bubble=step_time.bubble(
            config.parallel.pipeline, num_micro_batches(config), config.parallel.virtual_pipeline
        ),
    )


def _gpu_hours(
    train: TrainConfig, gpus: int, seconds: dict[str, tuple[float, float]], least: int, most: int
) -> tuple[float, float]:
    """Return the GPU hours of the run, fastest and slowest.

    `seconds` are those of a step of `least` rollouts; a method that refills may generate `most`,
    and then reaches a budget in fewer steps.
    """

    def hours(speed: int, per_step: int) -> float:
        steps = -(-_until_budget(train, per_step) // per_step)
        refills = seconds["rollouts"][speed] * (per_step / least - 1)
        return steps * (sum(both[speed] for both in seconds.values()) + refills) * gpus / 3600

    paces = (least, most)
    return min(hours(0, pace) for pace in paces), max(hours(1, pace) for pace in paces)


def _until_budget(train: TrainConfig, per_step: int) -> int:
    """Return the rollouts of the run; a budget ends it after the step that reaches it."""
    unlimited = train.total_steps * per_step
    budget = train.rollout_budget
    return unlimited if budget is None else min(unlimited, -(-budget // per_step) * per_step)
