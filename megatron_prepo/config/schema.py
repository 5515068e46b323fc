"""All settings of a run: a frozen tree of dataclasses, one per section.

Settings without a default are required; all others default to the paper's values (PREPO as first
published, with its ambiguities as named settings).  The string under each field is its
documentation, from which ``megatron-prepo reference`` generates ``docs/configuration.md``.  Every
error that can be found without opening a file or a model is raised here.
"""

import dataclasses
import datetime
import ipaddress
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from megatron_prepo.files import user_code
from megatron_prepo.files.rows import Fields

STRICT = ConfigDict(
    extra="forbid",
    use_attribute_docstrings=True,
    protected_namespaces=(),
    allow_inf_nan=False,
)
MAX_DEADLINE = 10_000_000
MAX_STOP_TEXTS = 32

SELECTION_METHODS = (
    "prepo",
    "random",
    "greso",
    "dapo",
    "mopps",
    "mapp",
    "kgps",
    "dps",
    "hive",
    "vip",
    "pilot_commit",
    "foresight",
    "oracle",
)
"""Values of `selection.method` besides `FILE.py:CLASS`."""

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "dr-grpo": {"advantage.std": "none", "loss.aggregation": "seq-mean-token-sum-norm"},
    "gspo": {
        "loss.policy": "gspo",
        "loss.clip_low": 3e-4,
        "loss.clip_high": 4e-4,
        "loss.aggregation": "seq-mean-token-mean",
        "loss.head": "recompute",
    },
}
"""Settings that a value of `loss.preset` stands for, as published."""

POSTERIORS = ("mapp", "mopps")
"""Methods with a posterior of each prompt's pass rate, for `advantage.method=posterior`."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Values of `lora.target_modules`."""

FilePath = Annotated[str, "path"]
"""Type of a setting that names a file or directory: a leading `~` and `$NAME` are expanded when the
setting is read (`literal` escapes a path that must not change)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Output directory and dashboards."""

    dir: FilePath
    """Directory of the run: config, metrics, ledger, checkpoints and the exported model."""
    overwrite: bool = False
    """Delete the existing run in `run.dir` and start a new one. If false, a run with the same
    settings is resumed, and a run with different settings is an error (`docs/reliability.md`). Only
    files with the names that a run writes, in a directory that a run has marked, are ever
    deleted."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard as well, to `tensorboard/` in `run.dir` (extra
    `tensorboard`)."""
    wandb_project: str | None = None
    """Weights & Biases project to which the metrics are logged as well (extra `wandb`)."""
    mlflow_experiment: str | None = None
    """MLflow experiment to which the metrics are logged as well, at MLFLOW_TRACKING_URI or, without
    it, in `mlflow/` in `run.dir` (extra `mlflow`)."""
    swanlab_project: str | None = None
    """SwanLab project to which the metrics are logged as well (extra `swanlab`)."""
    trackio_project: str | None = None
    """Trackio project to which the metrics are logged as well, in TRACKIO_DIR or, without it, in
    `trackio/` in `run.dir` (extra `trackio`)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The model to train."""

    hf: FilePath
    """Hugging Face directory with configuration, tokenizer and, unless `model.megatron` is set,
    weights; or a name on the hub such as `Qwen/Qwen2.5-0.5B`, whose revision the run records."""
    megatron: FilePath | None = None
    """Megatron `torch_dist` checkpoint to start from, as `checkpoints_convert import` writes it;
    not with `lora.rank`, whose adapters are exported for the weights of `model.hf`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the weights in forward and backward passes; the optimizer's copy is always
    float32."""
    layers: Literal["auto", "torch", "te"] = "auto"
    """Layer implementation: torch-native (`torch`), TransformerEngine (`te`), or TransformerEngine
    if it is installed (`auto`; torch-native with `lora.rank`)."""
    fp32_lm_head: bool = True
    """Keep logits in float32 in actor and engine, from inputs in `model.dtype`. If false, both
    round them to `model.dtype`. An engine that differs from the actor in this is an error."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Low-rank adapters, trained in place of the model's weights (`docs/lora.md`)."""

    rank: int = 0
    """Rank r of the adapters; 0: train all weights."""
    alpha: int = 16
    """The product of an adapter's two matrices is scaled by alpha / r."""
    target_modules: tuple[str, ...] = PROJECTIONS
    """Projections of each layer that have an adapter, by the names of `transformers`."""

    def __post_init__(self) -> None:
        _at_least("lora.rank", self.rank, 0)
        _at_least("lora.alpha", self.alpha, 1)
        names = self.target_modules
        if not names or len(set(names)) < len(names) or not set(names) <= set(PROJECTIONS):
            raise ValueError(
                f"lora.target_modules={list(names)} must be some of {', '.join(PROJECTIONS)}, each "
                "once"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not self.rank and value != field.default:
                value = list(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"lora.{field.name}={value} has no effect with lora.rank=0; set lora.rank too, "
                    "such as lora.rank=16"
                )

    @property
    def scale(self) -> float:
        """Factor of the product of the two matrices."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    """Parallel layout of the actor."""

    tensor: int = 1
    """Tensor-parallel size."""
    pipeline: int = 1
    """Pipeline-parallel size."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank. Values above 1 select the interleaved schedule: less idle
    time, more messages; the number of micro-batches becomes a multiple of `parallel.pipeline`."""
    context: int = 1
    """Context-parallel size: number of ranks that share the tokens of each micro-batch, for long
    sequences (`docs/parallel.md`). Its product with `parallel.tensor` must divide the number of
    attention heads."""
    expert: int = 1
    """Expert-parallel size (mixture of experts): complete experts are distributed over this many
    tensor-, context- and data-parallel ranks; 1: each rank holds its tensor-parallel shard of every
    expert."""
    data: int | None = None
    """Data-parallel size; empty: derived from the number of ranks that torchrun starts, or the
    smallest valid size."""
    sequence: bool = False
    """Sequence parallelism: also shard activations between tensor-parallel regions."""
    timeout_minutes: float = 10.0
    """Timeout of every collective; a rank that waits longer fails instead of hanging."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "data"):
            _at_least(f"parallel.{name}", getattr(self, name), 1)
        _deadline("parallel.timeout_minutes", self.timeout_minutes)
        if self.data and (self.tensor * self.context * self.data) % self.expert:
            context = f"parallel.context={self.context} x " if self.context > 1 else ""
            raise ValueError(
                f"parallel.expert={self.expert} must divide parallel.tensor={self.tensor} x "
                f"{context}parallel.data={self.data}, over whose ranks experts are distributed"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_pipeline={self.virtual_pipeline} needs parallel.pipeline > 1; "
                "set parallel.virtual_pipeline=1"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "parallel.sequence=true needs parallel.tensor > 1; set parallel.sequence=false"
            )

    @property
    def virtual_size(self) -> int | None:
        """Model chunks per rank as Megatron counts them: None without interleaving."""
        return self.virtual_pipeline if self.virtual_pipeline > 1 else None

    @property
    def expert_tensor(self) -> int:
        """Tensor-parallel size inside an expert."""
        return self.tensor if self.expert == 1 else 1

    @property
    def smallest_data(self) -> int:
        """Smallest valid data-parallel size: 1, or the size needed to distribute the experts."""
        return self.expert // math.gcd(self.expert, self.tensor * self.context)

    @property
    def replica(self) -> int:
        """Number of ranks per data-parallel replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def num_ranks(self) -> int:
        """Number of ranks of the job, with the smallest valid data-parallel size if none is set."""
        return self.replica * (self.data or self.smallest_data)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Prompts: files with one id, prompt and answer per row, in our schema, verl's or slime's."""

    train: FilePath
    """Training prompts: a file of JSON Lines or Parquet, a directory of them, a path with `*`, or a
    name on the hub such as `hf://datasets/OWNER/NAME/train*` (`docs/data.md`)."""
    eval: FilePath | dict[str, FilePath]
    """Held-out prompts: a file, or several by name, such as `{math: a.jsonl, code: b.jsonl}`. Each
    set is evaluated on its own, as if it were the only one; the pass rate of the run is that of all
    their prompts together (`docs/evaluation.md`)."""
    order: Literal["shuffled", "file"] = "shuffled"
    """Order of the training prompts: a new permutation per epoch, which follows from `train.seed`;
    or as in the file, the first again after the last."""
    prompt_field: str = "prompt"
    """Field of a row that has the prompt, a text or a list of messages; a dot leads to a field
    within a field."""
    answer_field: str | None = None
    """Field of a row that has the answer; empty: `answer`, `reward_model.ground_truth` (verl) or
    `label` (slime), whichever the first row of the file has."""
    chat_template: bool = False
    """Wrap each prompt with the tokenizer's chat template: a text as a user turn, a list of
    messages as it is."""
    chat_template_arguments: dict[str, Any] | None = None
    """Variables of the chat template, such as `{enable_thinking: false}`; one that the template
    does not use is an error."""
    system: str | None = None
    """System message before each prompt; needs `data.chat_template`."""
    few_shot: FilePath | None = None
    """File with `prompt` and `answer` per row, put before each prompt: as turns with
    `data.chat_template`, else as text, with an empty line after each answer (`docs/data.md`)."""
    chat_template_date: str | None = None
    """Current date for chat templates that use it (Llama 3.2's), such as `2026-01-31`; empty: the
    day on which the run was first started, also after it resumes."""
    max_prompt_tokens: int = 1024
    """Maximum prompt length (prompts are never truncated)."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """Longer prompts are an error that names the first, or are skipped in both files: the run logs
    their number, and `prompts.json` holds it."""

    def __post_init__(self) -> None:
        _at_least("data.max_prompt_tokens", self.max_prompt_tokens, 2)
        for name in ("prompt_field", "answer_field"):
            if (value := getattr(self, name)) is not None and not all(value.split(".")):
                raise ValueError(
                    f"data.{name}={value!r} must be the name of a field, such as prompt, or "
                    "reward_model.ground_truth"
                )
        names = self.eval if isinstance(self.eval, dict) else ["one"]
        if not names or not all(re.fullmatch(r"\w[\w-]*", name) for name in names):
            raise ValueError(
                f"data.eval={self.eval} must be a file, or a mapping of names to files, with names "
                "of letters, digits, - and _: they become parts of metrics' names"
            )
        for name in ("system", "chat_template_arguments"):
            if (value := getattr(self, name)) and not self.chat_template:
                raise ValueError(
                    f"data.{name}={value!r} needs a chat template; set data.chat_template=true, or "
                    f"remove data.{name}"
                )
        if self.chat_template_date is not None:
            _day("data.chat_template_date", self.chat_template_date)

    @property
    def fields(self) -> Fields:
        """The fields of a row."""
        return Fields(self.prompt_field, self.answer_field)

    @property
    def eval_files(self) -> dict[str, str]:
        """The held-out files by name; a single file has an empty name."""
        return self.eval if isinstance(self.eval, dict) else {"": self.eval}

    @property
    def eval_settings(self) -> dict[str, str]:
        """The held-out files by setting: `data.eval`, or `data.eval.NAME` for each."""
        return {
            f"data.eval.{name}" if name else "data.eval": file
            for name, file in self.eval_files.items()
        }


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SelectionConfig:
    """Selection of the K prompts to roll out among P candidates."""

    method: FilePath = "prepo"
    """`prepo`: window over sorted perplexity; `random`: uniform choice (the paper's baseline);
    `greso`, `dapo`, `mopps`, `mapp`, `kgps`, `dps`, `hive`: other published methods; `vip`,
    `pilot_commit`: published methods that share the step's K*G rollouts among prompts;
    `foresight`: ours; `oracle`: an upper bound that rolls out every candidate; or a custom selector
    `FILE.py:CLASS`, which may import modules from the file's directory. `docs/selection.md`
    compares them and shows a custom one."""
    num_candidates: int
    """P (|B| in the paper): prompts scored per step."""
    num_selected: int
    """K: prompts rolled out per step (the paper uses 20 % of the candidates)."""
    rho_max: float = 1.0
    """Final position of the window: 1 is at the highest perplexities, 0.5 in the middle."""
    horizon: int | None = None
    """Number of steps over which the window moves; empty: `train.total_steps`."""
    pacing: Literal["linear", "quadratic", "root"] = "linear"
    """Position of the window as a function of progress rho: rho (paper), its square, or its
    root."""
    direction: Literal["low-to-high", "high-to-low"] = "low-to-high"
    """Direction of the window: start at the lowest perplexities (paper), or at the highest."""
    target_pass_rate: float = 0.5
    """Pass rate that `mopps`, `foresight` and `oracle` aim for."""
    mopps_decay: float = 0.5
    """Factor by which `mopps` and `mapp` discount earlier observations at each new observation."""
    foresight_hidden: int = 0
    """Number of features of the prompt's mean last hidden state that `foresight` also predicts
    from (`docs/foresight.md`); 0: perplexity, length and mean entropy only. On a mixture of
    tasks and a pretrained model, 32 predict better; no training run with them has been made."""
    kgps_prior_variance: float = 3.29
    """Variance of an unseen prompt's logit for `kgps`, and the largest of any prompt; the default
    is that of a uniform pass rate, pi^2 / 3."""
    kgps_drift: float = 0.05
    """Variance that a step of updates of average size adds to each prompt's logit for `kgps`."""
    kgps_warm_up: int = 0
    """Number of first steps in which `kgps` chooses at random."""
    dps_decay: float = 0.5
    """Factor by which `dps` discounts earlier transitions in each step."""
    dps_prior: float = 1.0
    """Pseudo-count of each transition for `dps`: elements of the Dirichlet prior."""
    hive_band: tuple[float, float] = (0.5, 1.0)
    """Quantiles of the prompt entropy between which `hive` keeps prompts: from the median up (the
    paper's main text); [0.25, 0.75] is the configuration of its experiments."""
    vip_least: int = 4
    """Smallest number of rollouts of a prompt for `vip`; below G."""
    vip_most: int = 32
    """Largest number of rollouts of a prompt for `vip`; above G."""
    vip_variance: Literal["rloo", "group"] = "rloo"
    """Estimator whose variance `vip` minimises: leave-one-out advantages, or advantages relative to
    the mean of the group."""
    vip_bandwidth: float | None = None
    """Distance of two prompts' embeddings over which `vip` shares what it observes; they have
    length 1. Empty: the median distance among the candidates of the first step."""
    pilot_rollouts: int | None = None
    """Rollouts of a prompt in the pilot of `pilot_commit`; empty: a quarter of
    `rollout.samples_per_prompt`, at least 2."""
    pilot_band: tuple[float, float] = (0.125, 0.75)
    """Pass rates in the pilot between which `pilot_commit` generates more of a prompt."""
    pilot_evict: float = 1.0
    """Pass rate in the pilot from which on `pilot_commit` takes a prompt again only if no others
    remain; above 1: never."""
    ppl_tokens: Literal["all", "content"] = "all"
    """Tokens over which perplexity is computed: all prompt tokens, or only the user's text without
    the tokens of the chat template."""
    ppl_from: Literal["actor", "engine"] = "actor"
    """Source of the perplexities: a forward pass of the actor, or the engine, whose cache then
    already holds the selected prompts (`docs/off_policy.md`; not for `foresight` and `hive`, which
    need entropies)."""
    ppl_agreement: float = 0.95
    """Minimum rank correlation between actor and engine with `ppl_from=engine`: in the first step
    and in steps that evaluate, both compute the perplexities, and a lower correlation stops the
    run."""

    def __post_init__(self) -> None:
        if self.method not in SELECTION_METHODS and not self.is_custom:
            raise ValueError(
                f"selection.method={self.method} is neither one of {', '.join(SELECTION_METHODS)} "
                "nor of the form FILE.py:CLASS"
            )
        _at_least("selection.num_selected", self.num_selected, 1)
        if self.num_selected > self.num_candidates:
            raise ValueError(
                f"selection.num_selected={self.num_selected} is more than "
                f"selection.num_candidates={self.num_candidates}; K prompts are chosen among the "
                "candidates, so lower the first or raise the second"
            )
        if not 0 <= self.rho_max <= 1:
            raise ValueError(f"selection.rho_max={self.rho_max} must lie between 0 and 1")
        _at_least("selection.horizon", self.horizon, 1)
        if not -1 <= self.ppl_agreement <= 1:
            raise ValueError(
                f"selection.ppl_agreement={self.ppl_agreement} must lie between -1 and 1"
            )
        if self.method in ("foresight", "hive") and self.ppl_from == "engine":
            raise ValueError(
                f"selection.ppl_from=engine gives no entropies, which selection.method="
                f"{self.method} needs; set selection.ppl_from=actor"
            )
        for name in ("target_pass_rate", "mopps_decay", "dps_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"selection.{name}={getattr(self, name)} must lie between 0 and 1")
        _positive("selection.kgps_prior_variance", self.kgps_prior_variance)
        _at_least("selection.foresight_hidden", self.foresight_hidden, 0)
        _at_least("selection.kgps_drift", self.kgps_drift, 0)
        _at_least("selection.kgps_warm_up", self.kgps_warm_up, 0)
        _positive("selection.dps_prior", self.dps_prior)
        low, high = self.hive_band
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"selection.hive_band={[low, high]} must be two quantiles, the lower one first, "
                "such as [0.5,1] or [0.25,0.75]"
            )

        self._check_sizes()

    def _check_sizes(self) -> None:
        _at_least("selection.vip_least", self.vip_least, 3)
        _at_least("selection.vip_most", self.vip_most, self.vip_least)
        _positive("selection.vip_bandwidth", self.vip_bandwidth)
        _at_least("selection.pilot_rollouts", self.pilot_rollouts, 2)
        _at_least("selection.pilot_evict", self.pilot_evict, 0)
        low, high = self.pilot_band
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"selection.pilot_band={[low, high]} must be two pass rates, the lower one first, "
                "such as [0.125,0.75]"
            )

    @property
    def is_custom(self) -> bool:
        """Whether `method` has the form `FILE.py:CLASS`."""
        return user_code.has_form(self.method)

    @property
    def name(self) -> str:
        """Name of the method in records; without the directory of a custom selector's file."""
        return Path(self.method).name if self.is_custom else self.method


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WeightingConfig:
    """Weight of each rollout in the loss."""

    method: Literal["relative_entropy", "none"] = "relative_entropy"
    """w_i = mean token entropy of the rollout over the batch's mean entropy, or 1."""
    mean: Literal["sequence", "token"] = "sequence"
    """Batch mean: of the rollouts' means (paper, main text) or over tokens (appendix E)."""
    clamp: float | None = None
    """Bound c > 1 that keeps the weights within [1/c, c]; empty: no clamp (paper)."""
    include_zero_variance: bool = True
    """Include rollouts of groups without an advantage in the batch mean (paper: yes)."""

    def __post_init__(self) -> None:
        if self.clamp is not None and not self.clamp > 1:
            raise ValueError(f"weighting.clamp={self.clamp} must be above 1, or empty")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RolloutConfig:
    """Generation of completions."""

    engine: Literal["embedded", "sglang"] = "embedded"
    """`embedded`: a transformers model decodes inside the training processes; `sglang`: SGLang
    servers, started by the run or existing (section `servers`, `docs/sglang.md`)."""
    samples_per_prompt: int = 8
    """G: completions per selected prompt."""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities and entropies of rollouts are computed at the same
    temperature."""
    max_new_tokens: int
    """Maximum length of a completion; longer ones are truncated."""
    overlong: Literal["keep", "mask", "penalty"] = "keep"
    """Treatment of truncated completions: train on them like on any other; exclude them from the
    update, but not from their group's mean and standard deviation (DAPO's overlong filtering); or
    lower the reward of completions within `overlong_buffer` of the limit (DAPO's soft overlong
    punishment, `docs/method.md`)."""
    overlong_buffer: int | None = None
    """Tokens before `max_new_tokens` over which the penalty grows from 0 to 1; empty: a fifth of
    `max_new_tokens` (DAPO: 4,096 of 20,480)."""
    batch_size: int = 256
    """Completions per rank that are generated concurrently (embedded engine)."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, such as `["\\n\\n", "Question:"]`, to the end of the token that
    completes one. The text and its tokens stay in the completion, and rewards see it."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion besides the model's own (generation_config.json, else
    config.json): the text of a token as in the tokenizer's files, or its number."""
    router_replay: bool = False
    """Mixtures of experts: the actor's passes over rollouts route each token to the experts that
    the engine's forward pass chose, so that both compute the same function
    (`docs/off_policy.md`)."""

    def __post_init__(self) -> None:
        _at_least("rollout.samples_per_prompt", self.samples_per_prompt, 2)
        _at_least("rollout.max_new_tokens", self.max_new_tokens, 1)
        _at_least("rollout.batch_size", self.batch_size, 1)
        _positive("rollout.temperature", self.temperature)
        if "" in self.stop or len(self.stop) > MAX_STOP_TEXTS:
            raise ValueError(
                f"rollout.stop={list(self.stop)} must be at most {MAX_STOP_TEXTS} texts (SGLang's "
                "limit), none of them empty"
            )
        _at_least("rollout.overlong_buffer", self.overlong_buffer, 1)
        if self.overlong_buffer is not None and self.overlong != "penalty":
            raise ValueError(
                f"rollout.overlong_buffer={self.overlong_buffer} is used by rollout.overlong="
                f"penalty only, not by {self.overlong}; remove it or set rollout.overlong=penalty"
            )
        if self.penalty_buffer > self.max_new_tokens:
            raise ValueError(
                f"rollout.overlong_buffer={self.overlong_buffer} must be at most "
                f"rollout.max_new_tokens={self.max_new_tokens}"
            )

    @property
    def penalty_buffer(self) -> int:
        """Tokens over which the penalty of `overlong=penalty` grows."""
        return self.overlong_buffer or max(1, self.max_new_tokens // 5)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServersConfig:
    """SGLang servers of `rollout.engine=sglang`."""

    urls: tuple[str, ...] = ()
    """Existing servers, such as `[http://10.0.0.7:30000]`; empty: the run starts servers on the
    machine of rank 0, or a launched job on each node, and they are stopped when it ends."""
    count: int | None = None
    """Number of servers to start on a machine; empty: as many as the actor's GPUs on it hold, one
    without GPUs."""
    nodes: int = 0
    """Additional nodes of a launched job for servers only; 0: they share the GPUs of the ranks."""
    tensor: int = 1
    """Tensor-parallel size per server."""
    first_device: int = 0
    """GPU of the first server's first rank; all further ranks use the GPUs after it.  0: share the
    actor's GPUs; the number of the actor's ranks: use separate GPUs."""
    release_memory: bool = False
    """Release the memory of the key-value cache to the actor between rollouts (shared GPUs)."""
    python: FilePath | None = None
    """Python interpreter with SGLang installed; empty: the trainer's interpreter."""
    host: str = "127.0.0.1"
    """Address that the servers listen on; anyone who can reach it can use and modify them."""
    concurrency: int = 256
    """Maximum number of concurrent completions per server."""
    attempts: int = 4
    """Attempts per completion before the run stops with an error."""
    start_seconds: float = 900.0
    """Timeout for a server to become healthy."""
    connect_seconds: float = 10.0
    """Timeout for a connection, and for the response to a health check."""
    request_seconds: float = 1800.0
    """Timeout for a completion; a server that exceeds it is treated as failed."""
    straggler_seconds: float | None = None
    """Time after which a completion is truncated: the tokens so far are kept and recorded as
    `aborted`."""

    def __post_init__(self) -> None:
        for name in ("count", "tensor", "concurrency", "attempts"):
            _at_least(f"servers.{name}", getattr(self, name), 1)
        for name in ("nodes", "first_device"):
            _at_least(f"servers.{name}", getattr(self, name), 0)
        for name in ("start_seconds", "connect_seconds", "request_seconds", "straggler_seconds"):
            if getattr(self, name) is not None:
                _deadline(f"servers.{name}", getattr(self, name))
        _host("servers.host", self.host)
        if self.nodes and self.first_device:
            raise ValueError(
                f"servers.nodes={self.nodes} and servers.first_device={self.first_device}: on "
                "separate nodes, servers use all GPUs; set servers.first_device=0"
            )
        if self.nodes and self.urls:
            raise ValueError(
                f"servers.nodes={self.nodes} is for servers that the job starts, but servers.urls "
                "names existing ones; remove one of the two"
            )
        for url in self.urls:
            _no_secret(url)
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"servers.urls: {url!r} must start with http:// or https://")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"servers.urls={list(self.urls)} names a server twice")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WeightSyncConfig:
    """Transfer of the actor's weights to the engine, and its verification."""

    transport: Literal["value", "ipc", "distributed", "disk"] = "value"
    """Transport to SGLang: inside the requests (`value`); through shared memory, to servers on the
    devices of actor ranks on rank 0's machine (`ipc`); by broadcast (NCCL, or gloo on a CPU), to
    servers on separate devices (`distributed`); or through a directory that actor and servers share
    (`disk`)."""
    bucket_mb: int = 512
    """Maximum size of a bucket of tensors that are sent together."""
    request_seconds: float = 300.0
    """Timeout for a server's response during a sync; keep it below `parallel.timeout_minutes`."""
    directory: FilePath | None = None
    """Directory for the weights with `disk`, in a subdirectory per run; empty: in `run.dir`."""
    address: str = "127.0.0.1"
    """Address under which the servers reach rank 0 with `distributed`."""
    verify: Literal["first", "always", "never"] = "first"
    """Syncs after which the engine's log-probabilities of a training prompt are compared with the
    actor's: the first one (and the first one of a restarted server), all, or none."""
    tolerance: float | None = None
    """Maximum mean absolute difference accepted by the comparison, in nats; empty: 1e-4 for
    float32, 0.1 for bfloat16."""

    def __post_init__(self) -> None:
        _at_least("weight_sync.bucket_mb", self.bucket_mb, 1)
        _host("weight_sync.address", self.address)
        _deadline("weight_sync.request_seconds", self.request_seconds)
        if self.tolerance is not None:
            _positive("weight_sync.tolerance", self.tolerance)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardConfig:
    """Grading of completions."""

    function: FilePath = "final_number"
    """`final_number`: 1 if the number after the only `####` is the answer (GSM8K's convention);
    `math`: 1 if the last `\\boxed{}` equals the answer; `reasoning_gym`: the score of
    reasoning-gym, for prompts made of its tasks; or a custom function `FILE.py:FUNCTION`, which
    takes completion and answer, asks for more by name, and returns a number or a dict; it may
    import modules from the file's directory (`docs/evaluation.md`)."""
    low: float = 0.0
    """Smallest reward that the function may return."""
    high: float = 1.0
    """Largest reward that the function may return; a prompt passes at this reward."""
    seconds: float = 5.0
    """CPU time limit per answer; the wall-clock limit is ten times as long. An answer that exceeds
    either gets `reward.low`."""
    memory_mb: int = 1024
    """Address space per grading process; an answer that needs more gets `reward.low`."""
    processes: int | None = None
    """Number of grading processes on rank 0's machine; empty: one per core, at most 16."""
    max_failed: float = 0.5
    """Maximum share of the answers in a batch that may exceed a limit or raise an error; above it
    the run stops."""

    def __post_init__(self) -> None:
        _positive("reward.seconds", self.seconds)
        _at_least("reward.memory_mb", self.memory_mb, 128)
        _at_least("reward.processes", self.processes, 1)
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"reward.max_failed={self.max_failed} must lie between 0 and 1")
        if not self.low < self.high:
            raise ValueError(f"reward.low={self.low} must be below reward.high={self.high}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdvantageConfig:
    """Advantages of rollouts by their rewards (`docs/method.md`)."""

    method: Literal[
        "group", "posterior", "rl_zvp", "rloo", "reinforce++", "reinforce++-baseline"
    ] = "group"
    """`group`: relative to the group's mean (GRPO, paper); `posterior`: its expectation over the
    other completions, by the posterior of the prompt's pass rate (MaPP; needs
    `selection.method=mapp` or `mopps`); `rl_zvp`: `group`, and by token entropy where a group has
    no variance; `rloo`: relative to the mean of the other rewards of the group, without a division
    by `std`; `reinforce++`: normalised over all tokens of the step; `reinforce++-baseline`: the
    same after the group's mean is subtracted."""
    zvp_scale: float = 0.1
    """Scale alpha of `rl_zvp`'s advantages where a group has no variance."""
    std: Literal["unbiased", "population", "none"] = "unbiased"
    """Normalisation by the standard deviation of the group (`reinforce++`: of the step): with n-1
    in its denominator, with n, or none."""
    eps: float = 1e-6
    """Added to the standard deviation."""

    def __post_init__(self) -> None:
        _positive("advantage.eps", self.eps)
        _positive("advantage.zvp_scale", self.zvp_scale)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossConfig:
    """The clipped policy loss."""

    preset: Literal["none", "gspo", "dr-grpo"] = "none"
    """Settings of a published loss under one name (`docs/method.md`): those of them that are not
    given get its values, and another value is an error."""
    policy: Literal["clipped", "dual-clip", "cispo", "gspo"] = "clipped"
    """Objective of a token (`docs/method.md`): PPO's clipped ratio (paper); the same with a bound
    where the advantage is negative (`dual-clip`); the clipped ratio as a constant weight of the
    log-probability (`cispo`); or the clipped ratio of the rollout (`gspo`, for mixtures of
    experts)."""
    clip_low: float = 0.2
    """Lower clip: ratios below 1 - clip_low give no gradient where the advantage is negative; 1
    means no lower clip (`policy=cispo`)."""
    clip_high: float = 0.28
    """Upper clip (DAPO's clip-higher)."""
    dual_clip: float = 3.0
    """Bound c > 1 of `policy=dual-clip`: ratios above c give no gradient where the advantage is
    negative."""
    aggregation: Literal[
        "seq-mean-token-sum", "seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"
    ] = "seq-mean-token-sum"
    """Sum over tokens, then mean over rollouts (paper v1); mean over both (v3); mean over all
    tokens; or as the first, divided by `rollout.max_new_tokens` (Dr. GRPO)."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus (paper: none)."""
    kl_coef: float = 0.0
    """Coefficient of the k3 estimate of the KL divergence from the initial policy (paper: none);
    above 0, a copy of the initial policy is kept."""
    kl_in_reward: bool = False
    """Subtract `kl_coef` times the k1 estimate of the divergence from the rewards, instead of
    adding the k3 estimate to the loss (`docs/method.md`)."""
    importance: Literal["off", "truncated", "masked"] = "off"
    """Correction for an engine whose probabilities differ from the actor's, by the ratio of the
    two: truncated at `importance_high`, or zero outside the band (`docs/off_policy.md`)."""
    importance_level: Literal["token", "sequence"] = "token"
    """Level of the ratio: per token, or per rollout (the product over its tokens)."""
    importance_low: float = 0.5
    """Smallest ratio, actor over engine, that `masked` keeps."""
    importance_high: float = 2.0
    """Value at which `truncated` caps larger ratios; the largest ratio that `masked` keeps."""
    head: Literal["known-gradient", "recompute"] = "known-gradient"
    """Computation of the output head's gradient: together with the loss, while the logits exist (3
    matrix products), or in the backward pass, from recomputed logits (4 products)."""
    head_memory_mib: float | None = None
    """Memory for the logits that exist at a time in the output head, in MiB; their gradient takes
    their place.  Empty: 640 on a GPU (1,024 tokens of a vocabulary of 152,064), 16 on a CPU."""

    def __post_init__(self) -> None:
        unclipped = self.policy == "cispo" and self.clip_low == 1
        if not 0 < self.clip_low < 1 and not unclipped:
            raise ValueError(f"loss.clip_low={self.clip_low} must lie between 0 and 1")
        _positive("loss.clip_high", self.clip_high)
        if self.policy == "gspo" and self.head != "recompute":
            raise ValueError(
                "loss.policy=gspo needs the log-probabilities of complete rollouts before their "
                f"gradient, which loss.head={self.head} computes together, some tokens at a time; "
                "set loss.head=recompute"
            )
        if not self.dual_clip > 1:
            raise ValueError(f"loss.dual_clip={self.dual_clip} must be above 1")
        _at_least("loss.entropy_coef", self.entropy_coef, 0)
        _at_least("loss.kl_coef", self.kl_coef, 0)
        if self.kl_in_reward and not self.kl_coef:
            raise ValueError(
                "loss.kl_in_reward=true has no effect with loss.kl_coef=0; set loss.kl_coef above "
                "0, or loss.kl_in_reward=false"
            )
        if self.head_memory_mib is not None:
            _positive("loss.head_memory_mib", self.head_memory_mib)
        if not 0 <= self.importance_low <= 1 <= self.importance_high < math.inf:
            raise ValueError(
                f"loss.importance_low={self.importance_low} and loss.importance_high="
                f"{self.importance_high} must enclose 1, the ratio where engine and actor agree"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """Megatron's Adam, under Megatron's names."""

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule after the warm-up."""
    lr_warmup_steps: int = 0
    """Number of steps whose updates raise the learning rate linearly to its peak: the first of W
    updates uses `lr` / W, the last `lr`. 0 and 1 (with one update per step): no warm-up."""
    lr_decay_steps: int | None = None
    """Number of steps after which the learning rate reaches `optimizer.min_lr`; empty:
    `train.total_steps`. A run that is extended keeps its value."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay rate of the first moment."""
    adam_beta2: float = 0.95
    """Decay rate of the second moment."""
    adam_eps: float = 1e-8
    """Epsilon added to the root of the second moment."""
    clip_grad: float = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel ranks."""

    def __post_init__(self) -> None:
        _at_least("optimizer.lr", self.lr, 0)
        _at_least("optimizer.weight_decay", self.weight_decay, 0)
        _positive("optimizer.clip_grad", self.clip_grad)
        _positive("optimizer.adam_eps", self.adam_eps)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1)")
        _at_least("optimizer.lr_warmup_steps", self.lr_warmup_steps, 0)
        _at_least("optimizer.lr_decay_steps", self.lr_decay_steps, 1)
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"optimizer.min_lr={self.min_lr} must lie between 0 and optimizer.lr={self.lr}"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """Length and batching of the training loop."""

    total_steps: int
    """Number of steps. Each has one candidate batch, one set of rollouts and `train.mini_batches`
    updates. A larger number extends a run, even a finished one."""
    rollout_budget: int | None = None
    """Number of rollouts, kept or dropped, after which the run stops at the end of the step;
    methods that refill generate more per step. Empty: run all steps."""
    seed: int = 1
    """Seed from which all randomness of a run is derived."""
    mini_batches: int = 1
    """Optimizer updates per step; the rollouts are split between them."""
    overlap: bool = False
    """Generate the rollouts of the next step while the current one trains, with weights that are
    one step older than the weights they update (`docs/off_policy.md`)."""
    micro_batch_tokens: int = 8192
    """Maximum number of tokens per forward pass of the actor; a sequence is never split."""
    packing: bool = True
    """Pack sequences end to end. If false, they are padded to the longest one."""
    share_prefixes: bool = False
    """Compute a prompt once for all rollouts of its group that share a micro-batch, and score what
    all candidates begin with (chat template, few-shot examples) once. Results do not change, except
    for token counts per expert (`megatron.moe_aux_loss_coeff`)."""
    max_skipped_updates: int = 3
    """Maximum number of consecutive updates with a non-finite loss or gradient: these are skipped
    and dumped, and one more stops the run. 0: the first one stops the run."""

    def __post_init__(self) -> None:
        _at_least("train.max_skipped_updates", self.max_skipped_updates, 0)
        for name in ("total_steps", "rollout_budget", "mini_batches", "micro_batch_tokens"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        if self.share_prefixes and not self.packing:
            raise ValueError(
                "train.share_prefixes=true needs train.packing=true: padded batches share no "
                "prefixes"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvalConfig:
    """Held-out evaluation: avg@k."""

    every: int = 0
    """Interval between evaluations, in steps; 0: only before and after the run."""
    before: bool = True
    """Evaluate before the first step. If false, the run has no gain to report."""
    samples_per_prompt: int = 4
    """k of avg@k before and after the run."""
    samples_during: int = 1
    """k of avg@k for evaluations during the run."""
    max_prompts: int | None = None
    """Number of held-out prompts to use, from the start of the file; empty: all."""
    temperature: float = 1.0
    """Sampling temperature of the evaluation; 0: greedy, the most probable token at each place (one
    sample per prompt, since all would be equal)."""
    top_p: float = 1.0
    """Sample among the most probable tokens only that together have this probability; 1: all. Both
    limits apply to the full distribution at `eval.temperature`, as in SGLang."""
    top_k: int | None = None
    """Sample among this many most probable tokens only; empty: all."""
    pass_at: tuple[int, ...] = ()
    """Values of k, such as `[2, 4]`, for which evaluations report the unbiased pass@k as well, up
    to their number of samples (`docs/evaluation.md`)."""

    def __post_init__(self) -> None:
        _at_least("eval.every", self.every, 0)
        _at_least("eval.samples_per_prompt", self.samples_per_prompt, 1)
        _at_least("eval.samples_during", self.samples_during, 1)
        _at_least("eval.max_prompts", self.max_prompts, 1)
        _at_least("eval.temperature", self.temperature, 0)
        _at_least("eval.top_k", self.top_k, 1)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"eval.top_p={self.top_p} must be above 0 and at most 1")
        for k in self.pass_at:
            if not 1 <= k <= self.samples_per_prompt:
                raise ValueError(
                    f"eval.pass_at={list(self.pass_at)}: pass@{k} needs k from 1 to "
                    f"eval.samples_per_prompt={self.samples_per_prompt}; change one of the two"
                )
        if self.temperature == 0:
            self._check_greedy()

    def _check_greedy(self) -> None:
        """Raise ValueError for settings of random numbers where there are none."""
        for name in ("samples_per_prompt", "samples_during"):
            if (samples := getattr(self, name)) > 1:
                raise ValueError(
                    f"eval.temperature=0 decodes greedily, so the eval.{name}={samples} samples of "
                    f"a prompt would be equal; set eval.{name}=1, or a temperature above 0"
                )
        if self.top_p != 1 or self.top_k is not None:
            raise ValueError(
                f"eval.temperature=0 decodes greedily, so eval.top_p={self.top_p} and eval.top_k="
                f"{self.top_k} would change nothing; remove them, or set a temperature above 0"
            )

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of the distribution from which an evaluation samples."""
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """Checkpoints of the run."""

    every: int | None = None
    """Interval between Megatron checkpoints, in steps; empty: after the first step, and whenever
    saving has taken less than 5 % of the run's time (with `checkpoint.optimizer=false`, only at the
    end); 0: only at the end and when the run is asked to stop, so that a killed run repeats
    everything except the rollouts in its journal."""
    every_minutes: float | None = None
    """Save at the end of a step as well if this many minutes have passed since the last checkpoint
    or the start, by rank 0's clock; with `checkpoint.every` empty, in place of its rule of 5 %."""
    optimizer: bool = True
    """Save everything needed to resume: the states of the optimizer, the random number generators
    and the loop. If false, only weights are saved and an interrupted run restarts from scratch."""
    keep_last: int | None = None
    """Number of most recent checkpoints to keep; empty: all, or 2 while `checkpoint.every` is
    empty."""
    keep_every: int | None = None
    """Interval of checkpoints to keep in addition to `checkpoint.keep_last`: each whose step is a
    multiple of this."""
    keep_best: str | None = None
    """Metric by which the best checkpoint is kept in addition, and named in `checkpoints/best.json`
    (`docs/metrics.md`): one of evaluations such as `eval/pass_rate`, whose best state so far is
    saved even if no checkpoint is due, or one of steps such as `reward/mean`, by which the
    checkpoints that are saved anyway are compared. The earlier of two equal ones is kept."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Value of `checkpoint.keep_best` that counts as the best."""
    asynchronous: bool = False
    """Copy the state to host memory, which must have room for another copy of it, and write it
    while the next steps run."""
    grace_seconds: float = 300.0
    """Time for a checkpoint after SIGTERM or SIGUSR1: the run saves at the end of its step, and
    exits without saving if that takes longer than this."""

    def __post_init__(self) -> None:
        _at_least("checkpoint.every", self.every, 0)
        _positive("checkpoint.every_minutes", self.every_minutes)
        _at_least("checkpoint.keep_last", self.keep_last, 1)
        _at_least("checkpoint.keep_every", self.keep_every, 1)
        _positive("checkpoint.grace_seconds", self.grace_seconds)
        if self.keep_every and not self.keep_last:
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} adds to checkpoint.keep_last, which is "
                "empty; set it, for example to 2"
            )

    @property
    def num_kept(self) -> int | None:
        """Number of most recent checkpoints to keep; None: all."""
        return 2 if self.keep_last is None and self.every is None else self.keep_last


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextsConfig:
    """Texts kept in `texts/` of the run, shown by `megatron-prepo report` (`docs/training.md`)."""

    rollouts: int | None = 0
    """Number of prompts per step whose rollouts are kept with the entropy of each token: spread
    over the prompts rolled out, which a window sorts by perplexity; 0: none; empty: all."""
    evaluations: int | None = 0
    """Number of held-out prompts whose completions are kept at each evaluation, spread over the
    file; 0: none; empty: all."""

    def __post_init__(self) -> None:
        _at_least("texts.rollouts", self.rollouts, 0)
        _at_least("texts.evaluations", self.evaluations, 0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DebugConfig:
    """Debugging aids (`docs/debugging.md`)."""

    mode: Literal["train", "rollout"] = "train"
    """`rollout`: run everything except optimizer updates, to inspect prompts, rewards and speed."""
    dump_steps: tuple[int, ...] = ()
    """Steps, counted from 0, whose updates are dumped to `dumps/` for `megatron-prepo replay`."""
    dump_gradients: bool = True
    """Include gradients in dumps: 4 bytes per parameter and update."""
    max_skip_dumps: int = 3
    """Maximum number of skipped updates to dump; later ones are only counted."""

    def __post_init__(self) -> None:
        _at_least("debug.max_skip_dumps", self.max_skip_dumps, 0)
        for step in self.dump_steps:
            _at_least("debug.dump_steps", step, 0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProfileConfig:
    """Traces of chosen steps, for Perfetto or chrome://tracing, in `profile/` of the run."""

    steps: tuple[int, ...] = ()
    """Steps to trace, counted from 0 as in `metrics.jsonl`; a traced step is slower."""
    ranks: tuple[int, ...] = (0,)
    """Global ranks to trace."""
    stacks: bool = False
    """Record Python call stacks as well."""

    def __post_init__(self) -> None:
        for name in ("steps", "ranks"):
            for value in getattr(self, name):
                _at_least(f"profile.{name}", value, 0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """Configuration of a run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    selection: SelectionConfig
    rollout: RolloutConfig
    train: TrainConfig
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    servers: ServersConfig = dataclasses.field(default_factory=ServersConfig)
    weight_sync: WeightSyncConfig = dataclasses.field(default_factory=WeightSyncConfig)
    weighting: WeightingConfig = dataclasses.field(default_factory=WeightingConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    advantage: AdvantageConfig = dataclasses.field(default_factory=AdvantageConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    texts: TextsConfig = dataclasses.field(default_factory=TextsConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    debug: DebugConfig = dataclasses.field(default_factory=DebugConfig)
    megatron: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings passed to megatron-core under its own names: fields of TransformerConfig,
    DistributedDataParallelConfig and OptimizerConfig. Any other name is an error, and so is a value
    that does not have the field's type."""
    sglang: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings passed to the SGLang servers that the run starts, under SGLang's own names:
    `mem_fraction_static: 0.8` becomes `--mem-fraction-static 0.8`, `true` a bare flag, and an empty
    value removes one of our defaults.  SGLang's own parser checks them before launch.  The embedded
    engine and existing servers ignore them, and the run logs a warning."""

    def __post_init__(self) -> None:
        for key in self.sglang:
            if key.replace("-", "_").endswith("api_key"):
                raise ValueError(
                    f"sglang.{key} would be stored in config.yaml and in the server's log; remove "
                    "it: servers that the run starts listen on servers.host, which is this machine "
                    "unless changed"
                )
        rollouts = self.selection.num_selected * self.rollout.samples_per_prompt
        if self.train.mini_batches > self.selection.num_selected:
            raise ValueError(
                f"train.mini_batches={self.train.mini_batches} is more than "
                f"selection.num_selected={self.selection.num_selected}; each mini-batch needs at "
                "least one group"
            )
        if self.parallel.data and self.parallel.data * self.train.mini_batches > rollouts:
            raise ValueError(
                f"parallel.data={self.parallel.data} and train.mini_batches="
                f"{self.train.mini_batches} leave some ranks without any of the {rollouts} "
                "rollouts per step"
            )
        if self.train.overlap:
            self._check_overlap()
        self._check_advantage()
        self._check_group_sizes()
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if longest > self.train.micro_batch_tokens:
            raise ValueError(
                f"train.micro_batch_tokens={self.train.micro_batch_tokens} is less than "
                f"data.max_prompt_tokens={self.data.max_prompt_tokens} and rollout.max_new_tokens="
                f"{self.rollout.max_new_tokens} together, and a sequence is never split; set it to "
                f"{longest} or more"
            )
        if self.optimizer.lr_warmup_steps > self.train.total_steps:
            raise ValueError(
                f"optimizer.lr_warmup_steps={self.optimizer.lr_warmup_steps} must be at most "
                f"train.total_steps={self.train.total_steps}"
            )
        self._check_decay()
        self._check_preset()
        self._check_adapters()
        if late := [s for s in self.profile.steps if s >= self.train.total_steps]:
            raise ValueError(
                f"profile.steps={late} is out of range: steps run from 0 to "
                f"{self.train.total_steps - 1} (train.total_steps={self.train.total_steps})"
            )

    def _check_adapters(self) -> None:
        rank, model = self.lora.rank, self.model
        if rank and model.layers == "te":
            raise ValueError(
                f"lora.rank={rank} adapts torch-native layers, not model.layers=te; set "
                "model.layers=torch or lora.rank=0"
            )
        if rank and model.megatron:
            raise ValueError(
                f"lora.rank={rank} with model.megatron={model.megatron}: adapters are exported for "
                "the weights of model.hf, and would be trained for others; run `python -m "
                f"checkpoints_convert export --megatron {model.megatron} --hf {model.hf} --out "
                "DIR`, and set model.hf=DIR without model.megatron"
            )

    def _check_group_sizes(self) -> None:
        selection, group_size = self.selection, self.rollout.samples_per_prompt
        least, most = selection.vip_least, selection.vip_most
        if selection.method == "vip" and not least < group_size < most:
            raise ValueError(
                f"rollout.samples_per_prompt={group_size} must lie between selection.vip_least="
                f"{least} and selection.vip_most={most}: otherwise selection.method=vip gives "
                "every prompt as many rollouts, as random does"
            )
        pilot = selection.pilot_rollouts or default_pilot(group_size)
        if selection.method == "pilot_commit" and pilot >= group_size:
            raise ValueError(
                f"rollout.samples_per_prompt={group_size} must be above the {pilot} rollouts of a "
                "pilot (selection.pilot_rollouts; empty: a quarter of them, at least 2): otherwise "
                "selection.method=pilot_commit has nothing to commit"
            )

    def _check_preset(self) -> None:
        for name, value in PRESETS[self.loss.preset].items():
            section, key = name.split(".")
            given = getattr(getattr(self, section), key)
            if given != value:
                raise ValueError(
                    f"loss.preset={self.loss.preset} stands for {name}={value}, but {name}={given} "
                    "is given; remove one of them"
                )

    def _check_decay(self) -> None:
        optimizer, total_steps = self.optimizer, self.train.total_steps
        if optimizer.lr_decay_steps is None:
            return
        if optimizer.lr_warmup_steps >= optimizer.lr_decay_steps:
            raise ValueError(
                f"optimizer.lr_warmup_steps={optimizer.lr_warmup_steps} must be less than "
                f"optimizer.lr_decay_steps={optimizer.lr_decay_steps}"
            )
        decays = optimizer.lr_decay_style != "constant" and optimizer.min_lr == 0
        if decays and optimizer.lr_decay_steps < total_steps:
            raise ValueError(
                f"optimizer.lr_decay_steps={optimizer.lr_decay_steps} is less than "
                f"train.total_steps={total_steps}, and optimizer.min_lr=0: later steps would learn "
                f"nothing; set optimizer.lr_decay_steps={total_steps}, or optimizer.min_lr above 0"
            )

    def _check_advantage(self) -> None:
        if self.advantage.method == "rl_zvp" and self.loss.kl_in_reward:
            raise ValueError(
                "advantage.method=rl_zvp has no effect with loss.kl_in_reward=true, where no "
                "rewards are equal; set loss.kl_in_reward=false or advantage.method=group"
            )
        if self.advantage.method != "posterior":
            return
        if self.selection.method not in POSTERIORS:
            raise ValueError(
                "advantage.method=posterior needs the posterior of each prompt's pass rate, which "
                f"selection.method={self.selection.method} does not have; set selection.method to "
                f"{' or '.join(POSTERIORS)}, or advantage.method=group"
            )
        if self.loss.kl_in_reward or self.rollout.overlong == "penalty":
            raise ValueError(
                "advantage.method=posterior is computed from passes and failures, and would not "
                "see the penalties of loss.kl_in_reward=true or rollout.overlong=penalty; leave "
                "them out, or set advantage.method=group"
            )

    def _check_overlap(self) -> None:
        if self.rollout.engine == "embedded":
            raise ValueError(
                "train.overlap=true needs servers that generate while the actor trains, but "
                "rollout.engine=embedded generates in the actor's processes; set "
                "rollout.engine=sglang or train.overlap=false"
            )
        if self.selection.method == "kgps":
            raise ValueError(
                "train.overlap=true selects a step's prompts before the previous step's updates, "
                "but selection.method=kgps needs their size; set train.overlap=false or use "
                "another method"
            )
        if self.selection.method in ("greso", "dapo", "hive", "pilot_commit", "oracle"):
            raise ValueError(
                f"train.overlap=true selects a step's prompts once, before the step, but "
                f"selection.method={self.selection.method} needs rollouts of the step to select "
                "its prompts; set train.overlap=false or use another method"
            )
        if self.loss.importance == "off":
            raise ValueError(
                "train.overlap=true trains on rollouts of older weights, which loss.importance="
                "off does not correct for; set loss.importance=truncated (or masked)"
            )


def default_pilot(group_size: int) -> int:
    """Return the rollouts of a pilot where `selection.pilot_rollouts` is empty."""
    return max(2, group_size // 4)


def _at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and not value >= low:
        raise ValueError(f"{name}={value} must be at least {low}")


def _positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{name}={value} must be above 0")


def _deadline(name: str, value: float) -> None:
    _positive(name, value)
    if value > MAX_DEADLINE:
        raise ValueError(f"{name}={value} must be at most {MAX_DEADLINE:,}")


def _day(name: str, value: str) -> None:
    try:
        usable = datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{name}={value!r} must be a date such as 2026-01-31")


def _host(name: str, value: str) -> None:
    """Check that a value is a host name, IPv4 or IPv6 address, without other parts of a URL."""
    try:
        usable = "%" not in str(ipaddress.ip_address(value))  # a URL cannot contain a scope
    except ValueError:
        usable = re.fullmatch(r"[\w.-]+", value) is not None
    if not usable:
        raise ValueError(
            f"{name}={value!r} must be a host name or an IP address, without port and brackets"
        )


def _no_secret(url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ValueError(f"servers.urls: {url!r} is not a URL: {error}") from None
    if "@" in parts.netloc:
        raise ValueError(
            "servers.urls: a user or password in a URL would be stored in config.yaml and in logs; "
            "let a proxy on this machine add it"
        )
