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

With adapters (`lora.rank`), gradients and Adam are theirs alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_prepo.config import Config, ModelConfig, ParallelConfig, from_tree, to_tree
from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.shape import Shape
from megatron_prepo.plan import engine_plan, run_length, step_time
from megatron_prepo.plan.engine_plan import EnginePlan
from megatron_prepo.plan.gpus import GIB, GPUS, GPUS_PER_MACHINE
from megatron_prepo.plan.memory import Layers, head_workspace, stage_activations
from megatron_prepo.plan.run_length import Evaluations
from megatron_prepo.plan.step_time import MeasuredRates, ReferenceRun
from megatron_prepo.rollout.placement import GPUS_PER_NODE, Placement, check_transport, place

if TYPE_CHECKING:
    from megatron_prepo.actor.dry_run import Stage

ENGINES = ("embedded", "sglang", "elsewhere")
RESERVE = 6 * GIB
"""Bytes reserved on every GPU for the CUDA context, communication buffers, temporaries and
fragmentation: our guess, to be replaced by a measurement."""


@dataclass(frozen=True)
class PlanRequest:
    """What a plan depends on in addition to the configuration."""

    gpus: int | None = None
    """GPUs that train; default: as many as the layout's ranks."""
    gpu: str = "h100"
    gpus_per_node: int = GPUS_PER_NODE
    server_nodes: int | None = None
    """Additional nodes for servers; default: `servers.nodes`."""
    engine: str | None = None
    """`embedded`, `sglang`, or `elsewhere` for servers on GPUs that are not counted; default:
    `rollout.engine`."""
    engine_tensor: int | None = None
    """GPUs per SGLang engine; default: `servers.tensor`."""
    prompt_tokens: float | None = None
    """Mean tokens of a prompt; default: the maximum, `data.max_prompt_tokens`."""
    response_tokens: float | None = None
    """Mean tokens of a completion; default: the maximum, `rollout.max_new_tokens`."""
    eval_prompts: int | None = None
    """Prompts of an evaluation; default: those of `data.eval`, if it is on this machine."""
    reserve: int = RESERVE
    rates: MeasuredRates | None = None
    """Rates of a run of the user's; default: published ones."""

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus < 1:
            raise UserError(f"--gpus {self.gpus} must be at least 1")
        if self.gpu not in GPUS:
            raise UserError(f"--gpu {self.gpu!r} is not one of {', '.join(GPUS)}")
        if self.engine not in (None, *ENGINES):
            raise UserError(f"--engine {self.engine!r} is not one of {', '.join(ENGINES)}")


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a rank, as Megatron-Core's buffers hold them."""

    trained: int
    padded: int
    """Trained parameters with the padding of the distributed optimizer."""
    shard: float
    """Parameters whose optimizer state a rank keeps under the distributed optimizer."""
    gradient_bytes: int
    frozen: int = 0
    """Parameters that are not trained: weights only."""


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
    """The engine's: its complete batch (embedded), or what `sglang.mem_fraction_static` leaves."""
    releases: bool
    """Whether the engine gives its cache back while the actor learns."""
    distributed: bool
    """Whether `optimizer.use_distributed_optimizer` is set."""

    @property
    def actor(self) -> int:
        """Bytes that the actor holds at all times."""
        optimizer = self.optimizer_split if self.distributed else self.optimizer_whole
        return self.weights + self.gradients + optimizer + self.reference

    @property
    def updating(self) -> int:
        """Bytes of an update in addition."""
        return self.activations + self.head

    @property
    def total(self) -> int:
        """Peak bytes: update and generation alternate, and both sets of weights stay."""
        kept = self.actor + self.engine_weights
        if self.releases:
            return kept + max(self.updating, self.kv_cache)
        return kept + self.updating + self.kv_cache


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
    problems: tuple[str, ...]
    """Why the engines cannot run where they are."""
    where: Placement
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
    """Without evaluations."""
    evaluations: Evaluations | None
    """None if their number of prompts is not known."""
    evaluation_hours: tuple[float, float]
    """GPU hours of the evaluations."""

    @property
    def fits(self) -> bool:
        """Whether every rank fits in the GPU's memory minus the reserve, and the engines do."""
        most = max(rank.total for rank in self.ranks)
        return most + self.reserve <= self.memory and not self.problems


def make_plan(config: Config, request: PlanRequest) -> Plan:
    """Build the model without memory and predict; UserError for an impossible layout."""
    from megatron_prepo.actor.dry_run import count_parameters

    hf = read_hf_config(config.model.hf)
    shape, gpu = Shape.of(hf), GPUS[request.gpu]
    divisions = check(config, hf)
    config = as_requested(config, request)
    where = placed(config, request)
    stages = _stages(config, hf, where.ranks)
    parameters = count_parameters(hf, stages)
    engine = engine_plan.plan_engine(config, where, shape, parameters)
    ranks = tuple(
        rank_memory(
            config, request, shape, engine, stage.stage, stage.layers, _parameter_counts(stage)
        )
        for stage in stages
    )
    engine = with_room(config, request, shape, engine, ranks)
    active = parameters - shape.idle_parameters
    seconds = step_time.predict_seconds(
        _work(config, request, where, parameters, active),
        gpu=gpu,
        gpus=where.ranks,
        engine_gpus=where.engine_gpus,
        runs=reference_runs(request, shape),
    )
    least, most = run_length.rollouts_per_step(config)
    evaluations = _evaluations(config, request, least)
    hours = run_length.gpu_hours(config.train, where.gpus, seconds, least, most)
    evaluation_hours = run_length.evaluation_hours(
        evaluations.completions if evaluations else 0, where.gpus, seconds["rollouts"], least
    )
    seconds["rollouts"] = (seconds["rollouts"][0], seconds["rollouts"][1] * most / least)
    return Plan(
        model=config.model.hf,
        parameters=parameters,
        active_parameters=active,
        gpus=where.ranks,
        gpu=request.gpu,
        memory=gpu.memory,
        reserve=request.reserve,
        layout=layout_sizes(config.parallel),
        divisions=divisions,
        cautions=_cautions(config, hf),
        problems=_problems(request, shape, engine, ranks),
        where=where,
        ranks=ranks,
        engine=engine,
        micro_batches=num_micro_batches(config, longest(config)),
        sequence_tokens=longest(config),
        token_budget=config.train.micro_batch_tokens,
        seconds=seconds,
        rates=tuple(run.source for run in reference_runs(request, shape)),
        steps=config.train.total_steps,
        rollouts=(
            run_length.until_budget(config.train, least),
            run_length.until_budget(config.train, most),
        ),
        gpu_hours=hours,
        evaluations=evaluations,
        evaluation_hours=evaluation_hours,
    )


def _stages(config: Config, hf: dict[str, Any], world_size: int) -> "list[Stage]":
    from megatron_prepo.actor.dry_run import each_stage
    from megatron_prepo.actor.optimizer import ddp_config

    ddp = ddp_config(config.optimizer, config.megatron)
    model, parallel = config.model, config.parallel
    return list(
        each_stage(
            hf, model, parallel, ddp, config.megatron, world_size=world_size, lora=config.lora
        )
    )


def as_requested(config: Config, request: PlanRequest) -> Config:
    """Return the configuration with the engine and the number of GPUs of the request."""
    tree = to_tree(config)
    if request.engine:
        elsewhere = request.engine == "elsewhere"
        tree["rollout"] |= {"engine": "sglang" if elsewhere else request.engine}
        tree["servers"] |= {"urls": ["http://elsewhere"] if elsewhere else []}
        if request.engine != "sglang":
            tree["servers"] |= {"nodes": 0}
    if request.server_nodes is not None:
        tree["servers"] |= {"nodes": request.server_nodes}
    if request.engine_tensor:
        tree["servers"] |= {"tensor": request.engine_tensor}
    return with_data(from_tree(tree), request.gpus or config.parallel.num_ranks)


def placed(config: Config, request: PlanRequest) -> Placement:
    """Return where ranks and engines run."""
    where = place(config, gpus_per_node=request.gpus_per_node)
    check_transport(config.weight_sync.transport, where)
    return where


def with_room(
    config: Config,
    request: PlanRequest,
    shape: Shape,
    engine: EnginePlan,
    ranks: tuple[RankMemory, ...],
) -> EnginePlan:
    """Return the engine with `sequences_at_once`."""
    one = engine_plan.sequence_bytes(shape, engine.tensor, longest(config))
    held = max(rank.actor for rank in ranks) if engine.shared else 0
    return engine_plan.with_room(engine, GPUS[request.gpu], one, request.reserve + held)


def _problems(
    request: PlanRequest, shape: Shape, engine: EnginePlan, ranks: tuple[RankMemory, ...]
) -> tuple[str, ...]:
    held = max(rank.actor + (0 if engine.releases else rank.updating) for rank in ranks)
    return engine_plan.problems(engine, shape, GPUS[request.gpu], request.reserve + held)


def _evaluations(config: Config, request: PlanRequest, per_step: int) -> Evaluations | None:
    prompts = request.eval_prompts or run_length.eval_prompts(config)
    if prompts is None:
        return None
    steps = run_length.num_steps(config.train, per_step)
    return run_length.evaluations(config.eval, steps, prompts)


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
    from megatron_prepo.inputs.preflight import most_tokens

    check_layout(config, hf)
    shape, parallel = Shape.of(hf), config.parallel
    limit, of_what = most_tokens(config.rollout, hf)
    if longest(config) > limit:
        raise UserError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} and rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} exceed the model's {limit} {of_what}; lower one of "
            "them"
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
    micro_batches = num_micro_batches(config, longest(config))
    if micro_batches < parallel.pipeline:
        cautions.append(
            f"{micro_batches} micro-batches leave a pipeline of {parallel.pipeline} "
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


def num_micro_batches(config: Config, tokens: float) -> int:
    """Return the micro-batches per data-parallel rank and update, of sequences this long."""
    train = config.train
    rollouts = config.selection.num_selected * config.rollout.samples_per_prompt
    per_rank = -(-rollouts // (train.mini_batches * data_ranks(config.parallel)))
    needed = -(-per_rank // int(train.micro_batch_tokens // tokens))
    return needed + (-needed % config.parallel.pipeline if config.parallel.virtual_size else 0)


def mean_tokens(config: Config, request: PlanRequest) -> tuple[float, float]:
    """Return the mean tokens of prompts and of completions; by default the limits."""
    return (
        request.prompt_tokens or config.data.max_prompt_tokens,
        request.response_tokens or config.rollout.max_new_tokens,
    )


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


def rank_memory(
    config: Config,
    request: PlanRequest,
    shape: Shape,
    engine: EnginePlan,
    stage: int,
    layers: int,
    held: ParameterCounts,
) -> RankMemory:
    """Return all bytes of a rank of a pipeline stage."""
    from megatron_prepo.actor.cpu_offload import offload_fraction

    parallel, on_host = config.parallel, offload_fraction(config.megatron)
    split = config.optimizer.use_distributed_optimizer
    width = 2 if config.model.dtype == "bfloat16" else 4
    # Adam's two moments, and float32 weights if the model's are shorter
    state = 12 if config.model.dtype == "bfloat16" else 8
    last = stage == parallel.pipeline - 1
    keeps_reference = config.loss.kl_coef and not config.lora.rank
    in_buffers = held.padded if split else held.trained
    one = engine_plan.sequence_bytes(shape, engine.tensor, longest(config))
    return RankMemory(
        stage=stage,
        layers=layers,
        parameters=held.trained + held.frozen,
        weights=(in_buffers + held.frozen) * width,
        gradients=in_buffers * held.gradient_bytes,
        optimizer_split=round((1 - on_host) * held.shard * state),
        optimizer_whole=held.trained * state,
        # moments, float32 weights whatever the model's type, and gradients in transfer
        optimizer_host=round(on_host * held.shard * 16),
        # the initial policy, and space for the current one while the initial one scores
        reference=2 * held.trained * width if keeps_reference else 0,
        activations=round(
            stage_activations(
                shape,
                parallel,
                layer_kind(config.model),
                config.megatron,
                num_layers=layers // parallel.virtual_pipeline,
                in_flight=in_flight(parallel, stage, num_micro_batches(config, longest(config))),
                tokens=config.train.micro_batch_tokens,
                lora=config.lora,
            )
        ),
        head=head_bytes(config, shape) if last else 0,
        engine_weights=engine.weights if engine.shared else 0,
        kv_cache=engine_plan.cache_bytes(engine, GPUS[request.gpu], one),
        # without a fraction, the cache counts as one sequence
        releases=engine.releases or engine.fraction is None,
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
        trained=stage.trained,
        padded=sum(buffer.padded for buffer in stage.buffers),
        shard=sum(buffer.padded / buffer.ranks for buffer in stage.buffers),
        gradient_bytes=max(buffer.gradient_bytes for buffer in stage.buffers),
        frozen=stage.frozen,
    )


def _work(
    config: Config, request: PlanRequest, where: Placement, parameters: int, active: int
) -> step_time.StepWork:
    from megatron_prepo.selection import load

    selection, group = config.selection, config.rollout.samples_per_prompt
    prompt, response = mean_tokens(config, request)
    scored = selection.num_candidates if load(selection.method).needs_scores else 0
    least, _ = run_length.rollouts_per_step(config)
    trained = selection.num_selected * group * (prompt + response)
    return step_time.StepWork(
        parameters=parameters,
        active_parameters=active,
        prompt_tokens=scored * prompt,
        generated_tokens=0 if where.started_by == "user" else least * response,
        # with a KL penalty the initial policy scores, too
        scored_tokens=trained * (2 if config.loss.kl_coef else 1),
        trained_tokens=trained,
        bubble=step_time.bubble(
            config.parallel.pipeline,
            num_micro_batches(config, prompt + response),
            config.parallel.virtual_pipeline,
        ),
    )
