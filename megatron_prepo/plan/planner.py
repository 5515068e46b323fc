"""What a run will need on a cluster, found out on a laptop: memory a rank, seconds a step, layouts.

    megatron-prepo plan CONFIG --gpus 64 --gpu h100 [key=value ...]

Parameters and buffers are Megatron-Core's own: each pipeline stage of the real model is built on
the meta device (`actor.dry_run`).  Activations, output head and key-value cache are formulas
(`memory`), seconds are published or measured rates (`gpus`, `measured`); each says where it comes
from.  Of the model only `config.json` is read.

Bytes of a rank, by what Megatron-Core keeps for bfloat16 weights and Adam:

    weights    2 a parameter
    gradients  4, accumulated in float32
    Adam       12: float32 weights and two moments; with the distributed optimizer, divided by the
               data-parallel ranks (experts: by those that hold the same experts); of what is
               offloaded, 16 in host memory instead (gradients arrive there, too)
"""

import dataclasses
from dataclasses import dataclass

from megatron_prepo.config import Config, ParallelConfig, from_tree, to_tree
from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.shape import Shape
from megatron_prepo.plan import gpus as gpu_rates
from megatron_prepo.plan.gpus import GIB, GPUS, Gpu, MeasuredRates
from megatron_prepo.plan.memory import Layers, head_workspace, kv_bytes_a_token, stage_activations

ENGINES = ("embedded", "sglang", "elsewhere")
RESERVE = 6 * GIB
"""Set aside on every GPU for the CUDA context, communication buffers, temporaries and
fragmentation: a guess of ours, to be replaced by what a run measures."""


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is asked for besides the configuration."""

    gpus: int
    gpu: str = "h100"
    engine: str | None = None
    """`embedded`, `sglang`, or `elsewhere` for servers on GPUs that are not counted; empty: what
    `rollout.engine` says."""
    engine_tensor: int | None = None
    """GPUs that share one SGLang engine; empty: as few as leave it half of their memory."""
    prompt_tokens: float | None = None
    """Mean length of a prompt; empty: the longest, `data.max_prompt_tokens`."""
    response_tokens: float | None = None
    """Mean length of a completion; empty: the longest, `rollout.max_new_tokens`."""
    reserve: int = RESERVE
    rates: MeasuredRates | None = None
    """Of a run of one's own; empty: published ones."""

    def __post_init__(self):
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
    """With the padding that the distributed optimizer asks for."""
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
    """In host memory, under `megatron.optimizer_cpu_offload`."""
    reference: int
    """Copies of the weights for a KL penalty."""
    activations: int
    head: int
    engine_weights: int
    kv_cache: int
    """The engine's least: all its batch (embedded), or one sequence of full length (SGLang)."""
    distributed: bool
    """Whether the configuration says `optimizer.use_distributed_optimizer`."""

    @property
    def actor(self) -> int:
        """What the actor holds all the time."""
        optimizer = self.optimizer_split if self.distributed else self.optimizer_whole
        return self.weights + self.gradients + optimizer + self.reference

    @property
    def total(self) -> int:
        """At the fullest: learning and generating take turns, both sets of weights stay."""
        return self.actor + self.engine_weights + max(self.activations + self.head, self.kv_cache)


@dataclass(frozen=True)
class EnginePlan:
    """The engine on the same GPUs."""

    name: str
    tensor: int
    weights: int
    """Bytes of weights on a GPU."""
    sequences_wanted: int
    """Rollouts of a step that one engine has to do."""
    sequences_at_once: int
    """Of these, how many of full length the key-value cache has room for."""


@dataclass(frozen=True)
class Plan:
    """The answer."""

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
        """Whether every rank stays below the GPU's memory less the reserve."""
        most = max(rank.total for rank in self.ranks)
        return most + self.reserve <= self.memory and self.engine.sequences_at_once > 0


def make_plan(config: Config, question: PlanRequest) -> Plan:
    """Build, check and predict.  Raises UserError for a layout that cannot be."""
    from megatron_prepo.actor.dry_run import count_parameters, each_stage
    from megatron_prepo.actor.optimizer import ddp_config

    hf = read_hf_config(config.model.hf)
    shape = Shape.of(hf)
    divisions = check(config, hf)
    config = with_data(config, question.gpus)
    stages = list(
        each_stage(
            hf,
            config.model,
            config.parallel,
            ddp_config(config),
            config.megatron,
            world_size=question.gpus,
        )
    )
    parameters = count_parameters(hf, stages)
    engine = plan_engine(config, question, shape, parameters)
    ranks = tuple(
        rank_memory(config, shape, engine, stage.stage, stage.layers, _parameter_counts(stage))
        for stage in stages
    )
    engine = with_room(config, question, shape, engine, ranks)
    active = parameters - shape.idle_parameters
    work = _work(config, question, parameters, active)
    seconds = gpu_rates.predict_seconds(
        work, gpu=GPUS[question.gpu], gpus=question.gpus, runs=runs_behind(question, shape)
    )
    least, most = rollouts_a_step(config)
    gpu_hours = _gpu_hours(config, question.gpus, seconds, least, most)
    seconds["rollouts"] = (seconds["rollouts"][0], seconds["rollouts"][1] * most / least)
    return Plan(
        model=config.model.hf,
        parameters=parameters,
        active_parameters=active,
        gpus=question.gpus,
        gpu=question.gpu,
        memory=GPUS[question.gpu].memory,
        reserve=question.reserve,
        layout=layout_of(config),
        divisions=divisions,
        cautions=_cautions(config, hf),
        ranks=ranks,
        engine=engine,
        micro_batches=num_micro_batches(config),
        sequence_tokens=longest(config),
        token_budget=config.train.micro_batch_tokens,
        seconds=seconds,
        rates=tuple(run.source for run in runs_behind(question, shape)),
        steps=config.train.total_steps,
        rollouts=(_until_budget(config, least), _until_budget(config, most)),
        gpu_hours=gpu_hours,
    )


def runs_behind(question: PlanRequest, shape: Shape) -> tuple:
    """The runs whose rates predict: one's own, or the published ones of that kind of model."""
    return (question.rates,) if question.rates else gpu_rates.published(bool(shape.experts))


def with_data(config: Config, gpus: int) -> Config:
    """The configuration with `parallel.data` as so many GPUs make it, checked again."""
    from megatron_prepo.actor.parallel import check_world_size

    check_world_size(config.parallel, gpus)
    data = gpus // config.parallel.replica
    tree = to_tree(config)
    return from_tree(tree | {"parallel": tree["parallel"] | {"data": data}})


def check(config: Config, hf: dict) -> tuple[str, ...]:
    """What has to divide what, as sentences; raises UserError for the first that does not."""
    from megatron_prepo.actor.model import check_layout

    check_layout(config, hf)
    shape, parallel = Shape.of(hf), config.parallel
    if longest(config) > hf["max_position_embeddings"]:
        raise UserError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} and rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} do not fit the model's "
            f"{hf['max_position_embeddings']} positions; lower one of them"
        )
    tensor = parallel.tensor
    padding = -shape.vocabulary % tensor
    sentences = [
        f"{shape.heads} heads, {shape.groups} key-value heads, MLP {hf['intermediate_size']:,} "
        f"over tensor {tensor}"
        + (f" x context {parallel.context} (heads only)" if parallel.context > 1 else ""),
        f"vocabulary {shape.vocabulary:,} + {padding} rows of padding over tensor {tensor}",
        f"{shape.layers} layers over pipeline {parallel.pipeline}"
        + (f" x {parallel.virtual_pipeline} chunks" if parallel.virtual_size else ""),
    ]
    if shape.experts:
        sentences.append(f"{shape.experts} experts over expert {parallel.expert}")
    return tuple(sentences)


def _cautions(config: Config, hf: dict) -> tuple[str, ...]:
    parallel, cautions = config.parallel, []
    rollouts = config.selection.num_selected * config.rollout.samples_per_prompt
    if parallel.tensor > gpu_rates.GPUS_A_MACHINE:
        cautions.append(
            f"parallel.tensor={parallel.tensor} reaches over machines of "
            f"{gpu_rates.GPUS_A_MACHINE} GPUs, where its all-reduces are slow"
        )
    elif parallel.context > 1 and parallel.tensor * parallel.context > gpu_rates.GPUS_A_MACHINE:
        cautions.append(
            f"parallel.tensor={parallel.tensor} x parallel.context={parallel.context} reach over "
            f"machines of {gpu_rates.GPUS_A_MACHINE} GPUs, where exchanging heads in every layer "
            "is slow"
        )
    if rollouts % (parallel.data * config.train.mini_batches):
        cautions.append(
            f"{rollouts} rollouts of a step are not a multiple of parallel.data={parallel.data} x "
            f"train.mini_batches={config.train.mini_batches}: some ranks wait"
        )
    if num_micro_batches(config) < parallel.pipeline:
        cautions.append(
            f"{num_micro_batches(config)} micro-batches leave a pipeline of {parallel.pipeline} "
            "mostly idle; lower train.micro_batch_tokens or parallel.pipeline"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        cautions.append("parallel.sequence=true would split more activations at no cost")
    groups = hf.get("num_key_value_heads") or hf["num_attention_heads"]
    if parallel.tensor > groups:
        cautions.append(f"{groups} key-value heads are held more than once over the tensor ranks")
    return tuple(cautions)


def layout_of(config: Config) -> dict[str, int | bool]:
    """The layout's sizes, by the names of the section `parallel`."""
    parallel = config.parallel
    names = ("tensor", "pipeline", "context", "data", "expert", "sequence")
    return {name: getattr(parallel, name) for name in names}


def longest(config: Config) -> int:
    """Tokens of the longest sequence that the settings allow."""
    return config.data.max_prompt_tokens + config.rollout.max_new_tokens


def num_micro_batches(config: Config) -> int:
    """Micro-batches of a data-parallel rank in one update, if all sequences are the longest."""
    train = config.train
    rollouts = config.selection.num_selected * config.rollout.samples_per_prompt
    of_a_rank = -(-rollouts // (train.mini_batches * config.parallel.data))
    needed = -(-of_a_rank // (train.micro_batch_tokens // longest(config)))
    return needed + (-needed % config.parallel.pipeline if config.parallel.virtual_size else 0)


def in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage keeps at its fullest, of a model chunk each.

    1F1B begins with one for each stage behind; interleaved, with twice as many and all chunks but
    one of a round besides (arXiv 2104.04473, section 2.2.2).
    """
    behind = parallel.pipeline - stage - 1
    chunks = parallel.virtual_pipeline
    if chunks == 1:
        return min(behind + 1, micro_batches)
    return min(2 * behind + (chunks - 1) * parallel.pipeline + 1, micro_batches * chunks)


def rollouts_a_step(config: Config) -> tuple[int, int]:
    """Least and most: a method that refills stops somewhere between K and P groups."""
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
    """All bytes of a rank of a pipeline stage."""
    from megatron_prepo.actor.cpu_offload import offload_fraction

    parallel, on_host = config.parallel, offload_fraction(config.megatron)
    split = config.optimizer.use_distributed_optimizer
    of_type = 2 if config.model.dtype == "bfloat16" else 4
    # Adam's two moments, and float32 weights where those of the model are shorter
    state = 12 if config.model.dtype == "bfloat16" else 8
    last = stage == parallel.pipeline - 1
    # the embedded engine's batch, one sequence of SGLang's, or nothing
    at_once = {"embedded": engine.sequences_at_once, "sglang": 1, "elsewhere": 0}[engine.name]
    return RankMemory(
        stage=stage,
        layers=layers,
        parameters=held.parameters,
        weights=(held.padded if split else held.parameters) * of_type,
        gradients=(held.padded if split else held.parameters) * held.gradient_bytes,
        optimizer_split=round((1 - on_host) * held.shard * state),
        optimizer_whole=held.parameters * state,
        # moments, float32 weights whatever those of the model are, and gradients on their way
        optimizer_host=round(on_host * held.shard * 16),
        # the initial policy, and a place for the current one while the former scores
        reference=2 * held.parameters * of_type if config.loss.kl_coef else 0,
        activations=round(
            stage_activations(
                shape,
                parallel,
                layers_of(config),
                config.megatron,
                num_layers=layers // parallel.virtual_pipeline,
                in_flight=in_flight(parallel, stage, num_micro_batches(config)),
                tokens=config.train.micro_batch_tokens,
            )
        ),
        head=head_bytes(config, shape) if last else 0,
        engine_weights=engine.weights,
        kv_cache=at_once * longest(config) * kv_bytes_a_token(shape, tensor=engine.tensor),
        distributed=split,
    )


def layers_of(config: Config) -> Layers:
    """Whose activations are counted: `auto` counts as torch-native, which keep more."""
    return "te" if config.model.layers == "te" else "torch"


def head_bytes(config: Config, shape: Shape) -> int:
    """Workspace of the output head under the section `loss`, on a GPU."""
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


def _parameter_counts(stage) -> ParameterCounts:
    return ParameterCounts(
        parameters=stage.parameters,
        padded=sum(buffer.padded for buffer in stage.buffers),
        shard=sum(buffer.padded / buffer.ranks for buffer in stage.buffers),
        gradient_bytes=max(buffer.gradient_bytes for buffer in stage.buffers),
    )


def plan_engine(config: Config, question: PlanRequest, shape: Shape, parameters: int) -> EnginePlan:
    """The engine on these GPUs, before it is known how much room its key-value cache has."""
    name = question.engine or config.rollout.engine
    of_type = 2 if config.model.dtype == "bfloat16" else 4
    rollouts = config.selection.num_selected * config.rollout.samples_per_prompt
    if name == "embedded":
        wanted = -(-rollouts // question.gpus)
        return EnginePlan(
            name, 1, parameters * of_type, wanted, min(wanted, config.rollout.batch_size)
        )
    if name == "elsewhere":
        return EnginePlan(name, 1, 0, rollouts, rollouts)
    tensor = question.engine_tensor or _smallest_tensor(
        parameters * of_type, GPUS[question.gpu], question.gpus
    )
    if question.gpus % tensor:
        raise UserError(f"--engine-tensor {tensor} does not divide --gpus {question.gpus}")
    if shape.heads % tensor:
        raise UserError(f"--engine-tensor {tensor} does not divide the model's {shape.heads} heads")
    engines = question.gpus // tensor
    return EnginePlan(name, tensor, parameters * of_type // tensor, -(-rollouts // engines), 0)


def _smallest_tensor(weights: int, gpu: Gpu, gpus: int) -> int:
    tensor = 1
    while weights / tensor > gpu.memory / 2 and gpus % (2 * tensor) == 0:
        tensor *= 2
    return tensor


def with_room(
    config: Config,
    question: PlanRequest,
    shape: Shape,
    engine: EnginePlan,
    ranks: tuple[RankMemory, ...],
) -> EnginePlan:
    """With `sequences_at_once`: SGLang's cache takes what the fullest GPU has left."""
    if engine.name != "sglang":
        return engine
    busiest = max(rank.actor for rank in ranks)
    room = GPUS[question.gpu].memory - question.reserve - busiest - engine.weights
    sequence = longest(config) * kv_bytes_a_token(shape, tensor=engine.tensor)
    at_once = min(engine.sequences_wanted, max(0, room // sequence))
    return dataclasses.replace(engine, sequences_at_once=at_once)


def _work(
    config: Config, question: PlanRequest, parameters: int, active: int
) -> gpu_rates.StepWork:
    from megatron_prepo.selection import load

    selection, group = config.selection, config.rollout.samples_per_prompt
    prompt = question.prompt_tokens or config.data.max_prompt_tokens
    response = question.response_tokens or config.rollout.max_new_tokens
    scored = selection.num_candidates if load(selection.method).needs_scores else 0
    least, _ = rollouts_a_step(config)
    learnt = selection.num_selected * group * (prompt + response)
    return gpu_rates.StepWork(
        parameters=parameters,
        active_parameters=active,
        prompt_tokens=scored * prompt,
        generated_tokens=0 if question.engine == "elsewhere" else least * response,
        # the initial policy scores, too, where there is a penalty for leaving it
        scored_tokens=learnt * (2 if config.loss.kl_coef else 1),
        learnt_tokens=learnt,
        bubble=gpu_rates.bubble(
            config.parallel.pipeline, num_micro_batches(config), config.parallel.virtual_pipeline
        ),
    )


def _gpu_hours(
    config: Config, gpus: int, seconds: dict[str, tuple[float, float]], least: int, most: int
) -> tuple[float, float]:
    """Fastest and slowest.  `seconds` are of a step of `least` rollouts; a method that refills may
    pay for `most`, and then reaches a budget in fewer steps."""

    def hours(speed: int, a_step: int) -> float:
        steps = -(-_until_budget(config, a_step) // a_step)
        refills = seconds["rollouts"][speed] * (a_step / least - 1)
        return steps * (sum(both[speed] for both in seconds.values()) + refills) * gpus / 3600

    paces = (least, most)
    return min(hours(0, pace) for pace in paces), max(hours(1, pace) for pace in paces)


def _until_budget(config: Config, a_step: int) -> int:
    """Rollouts of the run; a budget ends it with the step that reaches it."""
    whole = config.train.total_steps * a_step
    budget = config.train.rollout_budget
    return whole if budget is None else min(whole, -(-budget // a_step) * a_step)
