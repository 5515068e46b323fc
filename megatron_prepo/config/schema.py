"""Every setting of a run: a frozen tree of dataclasses, a section each.

The defaults are the paper's (PREPO as first published, research ambiguities as named settings);
a setting without a default has to be given.  The text under each field is its documentation: the
configuration reference in ``docs/configuration.md`` is printed from here (``megatron-prepo
reference``).  Whatever can be wrong without looking at a file or a model is refused here.
"""

import dataclasses
import datetime
import ipaddress
import math
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(
    extra="forbid",
    use_attribute_docstrings=True,
    protected_namespaces=(),
    allow_inf_nan=False,
)
MAX_DEADLINE = 10_000_000

FilePath = Annotated[str, "path"]
"""The type of a setting that names a file or directory: a `~` in front and `$NAME` are expanded
when it is read (`literal` writes a path that stays as it is)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Where the run lives."""

    dir: FilePath
    """Directory of the run: config, metrics, ledger, checkpoints and the exported model."""
    overwrite: bool = False
    """Delete the run that is in `run.dir` and start a new one. If false, a run with the same
    settings is resumed, and one of other settings is an error (`docs/reliability.md`). Only what
    has a run's own names, in a directory that a run has marked, is ever deleted."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, to `tensorboard/` there (extra `tensorboard`)."""
    wandb_project: str | None = None
    """Also log the metrics to this Weights & Biases project (extra `wandb`)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The model that learns."""

    hf: FilePath
    """Hugging Face directory: configuration, tokenizer and (unless `model.megatron`) weights."""
    megatron: FilePath | None = None
    """Megatron `torch_dist` checkpoint to start from, as `checkpoints_convert import` writes it."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the weights in forward and backward; the optimizer's are always float32."""
    layers: Literal["auto", "torch", "te"] = "auto"
    """Layer implementation: torch-native, TransformerEngine, or the latter where installed."""
    fp32_lm_head: bool = True
    """Logits stay float32 in actor and engine, from inputs in `model.dtype`; false: both round them
    to `model.dtype`. An engine that does otherwise than the actor is refused."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    """How the actor is spread over ranks."""

    tensor: int = 1
    """Tensor-parallel size."""
    pipeline: int = 1
    """Pipeline-parallel size."""
    virtual_pipeline: int = 1
    """Model chunks of each pipeline rank. With several the schedule is interleaved: less idle time,
    more messages; the number of micro-batches becomes a multiple of `parallel.pipeline`."""
    context: int = 1
    """Context-parallel size: so many ranks share the tokens of each micro-batch, for long sequences
    (`docs/parallel.md`); times `parallel.tensor` it must divide the attention heads."""
    expert: int = 1
    """Expert-parallel size (mixture of experts): whole experts are spread over this many of the
    tensor-, context- and data-parallel ranks; 1: each holds its tensor-parallel part of all."""
    data: int | None = None
    """Data-parallel size; empty: what the ranks given by torchrun leave, or the smallest."""
    sequence: bool = False
    """Sequence parallelism: activations between tensor-parallel regions are split too."""
    timeout_minutes: float = 10.0
    """Deadline of every collective; a rank that waits longer fails instead of hanging."""

    def __post_init__(self):
        for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "data"):
            _at_least(f"parallel.{name}", getattr(self, name), 1)
        _deadline("parallel.timeout_minutes", self.timeout_minutes)
        if self.data and (self.tensor * self.context * self.data) % self.expert:
            context = f"parallel.context={self.context} x " if self.context > 1 else ""
            raise ValueError(
                f"parallel.expert={self.expert} must divide parallel.tensor={self.tensor} x "
                f"{context}parallel.data={self.data}, over whose ranks experts are spread"
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
        """Model chunks of each rank as Megatron counts them: None without interleaving."""
        return self.virtual_pipeline if self.virtual_pipeline > 1 else None

    @property
    def expert_tensor(self) -> int:
        """Tensor-parallel size inside an expert."""
        return self.tensor if self.expert == 1 else 1

    @property
    def smallest_data(self) -> int:
        """The smallest data-parallel size: 1, or what it takes to spread the experts."""
        return self.expert // math.gcd(self.expert, self.tensor * self.context)

    @property
    def replica(self) -> int:
        """Ranks of one data-parallel replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def num_ranks(self) -> int:
        """Of the job, with the smallest data-parallel size where none is given."""
        return self.replica * (self.data or self.smallest_data)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Prompts: JSON Lines files with an id, a prompt and an answer a line."""

    train: FilePath
    """Training prompts."""
    eval: FilePath
    """Held-out prompts."""
    chat_template: bool = False
    """Wrap each prompt as a user turn by the tokenizer's chat template."""
    chat_template_date: str | None = None
    """What the chat template is told of today's date, as `2026-01-31`, if it asks (Llama 3.2's);
    empty: the day of the run's first start, also when it resumes."""
    max_prompt_tokens: int = 1024
    """A longer prompt is an error that names it (nothing is cut silently)."""

    def __post_init__(self):
        _at_least("data.max_prompt_tokens", self.max_prompt_tokens, 2)
        if self.chat_template_date is not None:
            _day("data.chat_template_date", self.chat_template_date)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SelectionConfig:
    """Which K of the P candidate prompts are rolled out."""

    method: Literal["prepo", "random", "greso", "dapo", "mopps", "foresight", "oracle"] = "prepo"
    """`prepo`: window over sorted perplexity; `random`: uniform choice (the paper's baseline);
    `greso`, `dapo`, `mopps`: the published rivals; `foresight`: ours; `oracle`: an upper bound that
    rolls out every candidate. `docs/selection.md` compares them."""
    num_candidates: int
    """|B| in the paper, P here: prompts scored in a step."""
    num_selected: int
    """K: prompts rolled out in a step (the paper uses 20 % of the candidates)."""
    rho_max: float = 1.0
    """Where the window stops: 1 ends on the highest perplexities, 0.5 in the middle."""
    horizon: int | None = None
    """Steps in which the window travels; empty: `train.total_steps`."""
    pacing: Literal["linear", "quadratic", "root"] = "linear"
    """How the window's place follows from progress rho: rho (paper), its square, or its root."""
    direction: Literal["low-to-high", "high-to-low"] = "low-to-high"
    """Where the window starts: at the lowest perplexities (paper), or at the highest."""
    target_pass_rate: float = 0.5
    """The pass rate that `mopps`, `foresight` and `oracle` look for."""
    mopps_decay: float = 0.5
    """`mopps`: how much of what was observed before still counts at the next observation."""
    ppl_tokens: Literal["all", "content"] = "all"
    """Perplexity over all prompt tokens, or only the user's text without the chat template's."""
    ppl_from: Literal["actor", "engine"] = "actor"
    """Who computes it: a forward pass of the actor; or the engine, whose cache then has the prompts
    that are rolled out (`docs/off_policy.md`; not for `foresight`, which needs entropies)."""
    ppl_agreement: float = 0.95
    """`ppl_from=engine`: in the first step and those that evaluate, both compute it, and a rank
    correlation below this ends the run."""

    def __post_init__(self):
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
        if self.method == "foresight" and self.ppl_from == "engine":
            raise ValueError(
                "selection.ppl_from=engine gives no entropies, which selection.method=foresight "
                "needs; set selection.ppl_from=actor"
            )
        for name in ("target_pass_rate", "mopps_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"selection.{name}={getattr(self, name)} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WeightingConfig:
    """Weight of each rollout in the loss."""

    method: Literal["relative_entropy", "none"] = "relative_entropy"
    """w_i = mean token entropy of the rollout over the batch's mean entropy, or 1."""
    mean: Literal["sequence", "token"] = "sequence"
    """The batch's mean: of the rollouts' means (paper, main text) or over tokens (appendix E)."""
    clamp: float | None = None
    """c > 1 keeps the weights within [1/c, c]; empty: no clamp (paper)."""
    include_zero_variance: bool = True
    """Whether rollouts of groups without an advantage count in the batch's mean (paper: yes)."""

    def __post_init__(self):
        if self.clamp is not None and not self.clamp > 1:
            raise ValueError(f"weighting.clamp={self.clamp} must be above 1, or empty")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RolloutConfig:
    """How completions are generated."""

    engine: Literal["embedded", "sglang"] = "embedded"
    """`embedded`: a transformers model decodes inside the training processes; `sglang`: SGLang
    servers, ours or given ones (section `servers`, `docs/sglang.md`)."""
    samples_per_prompt: int = 8
    """G: completions of a selected prompt."""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities and entropies of rollouts are taken at it too."""
    max_new_tokens: int
    """A completion is cut there."""
    batch_size: int = 256
    """Completions generated at once by a rank (embedded engine)."""
    router_replay: bool = False
    """Mixtures of experts: the actor's passes over rollouts send each token to the experts that the
    engine's forward pass chose, so that both compute the same function (`docs/off_policy.md`)."""

    def __post_init__(self):
        _at_least("rollout.samples_per_prompt", self.samples_per_prompt, 2)
        _at_least("rollout.max_new_tokens", self.max_new_tokens, 1)
        _at_least("rollout.batch_size", self.batch_size, 1)
        _positive("rollout.temperature", self.temperature)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServersConfig:
    """The SGLang servers of `rollout.engine=sglang`."""

    urls: tuple[str, ...] = ()
    """Servers that run already, such as `[http://10.0.0.7:30000]`; empty: the run starts its own on
    the machine of rank 0, and ends them with itself."""
    count: int = 1
    """How many the run starts."""
    tensor: int = 1
    """Tensor-parallel size of each of them."""
    first_device: int = 0
    """GPU of the first one's first rank; the others follow.  0: the GPUs that the actor uses too;
    the number of the actor's ranks: GPUs of their own."""
    release_memory: bool = False
    """Give the memory of the key-value cache back to the actor between rollouts (shared GPUs)."""
    python: FilePath | None = None
    """Interpreter that has SGLang; empty: the trainer's own."""
    host: str = "127.0.0.1"
    """Address that the servers listen on; anyone who reaches it can use and change them."""
    concurrency: int = 256
    """Completions under way at once at each server."""
    attempts: int = 4
    """How often a completion is asked for, before the run gives up."""
    start_seconds: float = 900.0
    """Deadline for a server to become healthy."""
    connect_seconds: float = 10.0
    """Deadline for a connection, and for the answer of a health check."""
    request_seconds: float = 1800.0
    """Deadline for a completion; a server that misses it is given up."""
    straggler_seconds: float | None = None
    """Cut a completion that takes longer: what it has so far is kept, recorded as `aborted`."""

    def __post_init__(self):
        for name in ("count", "tensor", "concurrency", "attempts"):
            _at_least(f"servers.{name}", getattr(self, name), 1)
        _at_least("servers.first_device", self.first_device, 0)
        for name in ("start_seconds", "connect_seconds", "request_seconds", "straggler_seconds"):
            if getattr(self, name) is not None:
                _deadline(f"servers.{name}", getattr(self, name))
        _host("servers.host", self.host)
        for url in self.urls:
            _no_secret(url)
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"servers.urls: {url!r} must start with http:// or https://")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"servers.urls={list(self.urls)} names a server twice")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WeightSyncConfig:
    """How the engine gets the actor's weights, and how that is checked."""

    transport: Literal["value", "ipc", "distributed", "disk"] = "value"
    """To SGLang: inside the requests; through memory, to servers on the devices of actor ranks on
    rank 0's machine; by broadcast (NCCL, or gloo on a CPU), to servers on devices of their own; or
    through a directory that actor and servers share."""
    bucket_mb: int = 512
    """Tensors travel together up to this size."""
    request_seconds: float = 300.0
    """Deadline for a server's answer in a sync; keep it below `parallel.timeout_minutes`."""
    directory: FilePath | None = None
    """`disk`: where the weights are put, in a folder of this run's own; empty: in `run.dir`."""
    address: str = "127.0.0.1"
    """`distributed`: address under which the servers find rank 0."""
    verify: Literal["first", "always", "never"] = "first"
    """After the first sync (and that of a server started anew), each or none: compare the engine's
    log-probabilities of a training prompt with the actor's."""
    tolerance: float | None = None
    """Largest mean absolute difference that passes, in nats; empty: 1e-4 for float32, 0.1 for
    bfloat16."""

    def __post_init__(self):
        _at_least("weight_sync.bucket_mb", self.bucket_mb, 1)
        _host("weight_sync.address", self.address)
        _deadline("weight_sync.request_seconds", self.request_seconds)
        if self.tolerance is not None:
            _positive("weight_sync.tolerance", self.tolerance)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardConfig:
    """How a completion is graded."""

    function: FilePath = "final_number"
    """`final_number`: 1 if the number after the only `####` is the answer (GSM8K's convention);
    `math`: 1 if the last `\\boxed{}` equals the answer (`docs/evaluation.md`); or your own, as
    `FILE.py:FUNCTION`, which takes completion and answer and returns a number; modules beside the
    file can be imported."""
    low: float = 0.0
    """Smallest reward the function may give."""
    high: float = 1.0
    """Largest reward the function may give; a prompt passes at this reward."""
    seconds: float = 5.0
    """Processor time for an answer, ten times as much on the clock; then it gets `reward.low`."""
    memory_mb: int = 1024
    """Address space of a grading process; an answer that needs more gets `reward.low`."""
    processes: int | None = None
    """Grading processes, on rank 0's machine; empty: one a core, at most 16."""
    max_failed: float = 0.5
    """The run ends when more than this share of the answers graded at once break a limit, or raise
    an error."""

    def __post_init__(self):
        _positive("reward.seconds", self.seconds)
        _at_least("reward.memory_mb", self.memory_mb, 128)
        _at_least("reward.processes", self.processes, 1)
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"reward.max_failed={self.max_failed} must lie between 0 and 1")
        if not self.low < self.high:
            raise ValueError(f"reward.low={self.low} must be below reward.high={self.high}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdvantageConfig:
    """Group-relative advantages (GRPO)."""

    std: Literal["unbiased", "population", "none"] = "unbiased"
    """Divide by the group's standard deviation (n-1 or n in its denominator), or do not."""
    eps: float = 1e-6
    """Added to the standard deviation."""

    def __post_init__(self):
        _positive("advantage.eps", self.eps)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossConfig:
    """The clipped policy loss."""

    clip_low: float = 0.2
    """Lower clip: ratios below 1 - clip_low bring no gradient where the advantage is negative."""
    clip_high: float = 0.28
    """Upper clip (DAPO's clip-higher)."""
    aggregation: Literal["seq-mean-token-sum", "seq-mean-token-mean", "token-mean"] = (
        "seq-mean-token-sum"
    )
    """Sum over tokens, mean over rollouts (paper v1); mean, mean (v3); or mean over all tokens."""
    entropy_coef: float = 0.0
    """Entropy bonus (paper: none)."""
    kl_coef: float = 0.0
    """Penalty on the k3 estimate of KL to the initial policy (paper: none); keeps a copy of it."""
    importance: Literal["off", "truncated", "masked"] = "off"
    """Correction for an engine whose probabilities are not the actor's, by their ratio: counts at
    most `importance_high`, or not at all outside of the band (`docs/off_policy.md`)."""
    importance_level: Literal["token", "sequence"] = "token"
    """The ratio is each token's, or the whole rollout's: the product over its tokens."""
    importance_low: float = 0.5
    """`masked`: the smallest ratio, of actor over engine, that counts."""
    importance_high: float = 2.0
    """`truncated`: what a larger ratio counts; `masked`: the largest that counts."""
    head: Literal["known-gradient", "recompute"] = "known-gradient"
    """How the output head gets its gradient: with the loss, while the logits exist (3 matrix
    products), or afterwards, from logits computed again (4 products)."""
    head_memory_mib: float | None = None
    """Memory for the logits that exist at once in the output head, and their gradient, in MiB;
    empty: 900 on a GPU (1,024 tokens of a vocabulary of 152,064), 16 on a CPU."""

    def __post_init__(self):
        if not 0 < self.clip_low < 1:
            raise ValueError(f"loss.clip_low={self.clip_low} must lie between 0 and 1")
        _positive("loss.clip_high", self.clip_high)
        _at_least("loss.entropy_coef", self.entropy_coef, 0)
        _at_least("loss.kl_coef", self.kl_coef, 0)
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
    """Course of the learning rate after the warm-up."""
    lr_warmup_steps: int = 0
    """Steps whose updates raise the learning rate to its peak, in equal parts: the first of W
    updates has `lr` / W, the last `lr`. 0 and 1 (with one update per step): no warm-up."""
    lr_decay_steps: int | None = None
    """Steps after which the learning rate has come down to `optimizer.min_lr`; empty:
    `train.total_steps`. A run that is extended keeps its number."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest gradient norm; a larger gradient is scaled down to it."""
    use_distributed_optimizer: bool = False
    """Split the optimizer's state over the data-parallel ranks."""

    def __post_init__(self):
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
    """The length and the arithmetic of the training loop."""

    total_steps: int
    """Steps: one candidate batch, one set of rollouts, `train.mini_batches` updates each. A larger
    number extends a run, also one that is finished."""
    rollout_budget: int | None = None
    """Stop after the step that reaches so many rollouts, kept or dropped; methods that refill pay
    more a step. Empty: run all steps."""
    seed: int = 1
    """Everything random in a run derives from it."""
    mini_batches: int = 1
    """Optimizer updates a step; the rollouts are split between them."""
    overlap: bool = False
    """Generate the rollouts of the next step while this one trains, by weights that are a step
    older than those that learn from them (`docs/off_policy.md`)."""
    micro_batch_tokens: int = 8192
    """Tokens in a forward pass of the actor, at most; a sequence is never split."""
    packing: bool = True
    """Lay sequences end to end; false: side by side, padded to the longest."""
    share_prefixes: bool = False
    """Compute the prompt of a group's rollouts once for all that share a micro-batch; changes no
    result, but what experts count (`megatron.moe_aux_loss_coeff`)."""
    max_skipped_updates: int = 3
    """An update whose loss or gradient is not finite is skipped and dumped; more than so many in a
    row end the run. 0: the first one does."""

    def __post_init__(self):
        _at_least("train.max_skipped_updates", self.max_skipped_updates, 0)
        for name in ("total_steps", "rollout_budget", "mini_batches", "micro_batch_tokens"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        if self.share_prefixes and not self.packing:
            raise ValueError(
                "train.share_prefixes=true needs train.packing=true: what is padded is not shared"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvalConfig:
    """Held-out evaluation: avg@k."""

    every: int = 0
    """Evaluate after every so many steps; 0: only before and after the run."""
    samples_per_prompt: int = 4
    """k of avg@k, before and after the run."""
    samples_during: int = 1
    """k of the evaluations in between."""
    max_prompts: int | None = None
    """Use the first so many held-out prompts; empty: all."""
    temperature: float = 1.0
    """Sampling temperature of the evaluation."""

    def __post_init__(self):
        _at_least("eval.every", self.every, 0)
        _at_least("eval.samples_per_prompt", self.samples_per_prompt, 1)
        _at_least("eval.samples_during", self.samples_during, 1)
        _at_least("eval.max_prompts", self.max_prompts, 1)
        _positive("eval.temperature", self.temperature)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """What is kept on disk."""

    every: int = 0
    """Save a Megatron checkpoint after every so many steps; 0: only at the end."""
    optimizer: bool = True
    """Save what a run needs to go on: the optimizer's state, random states, the loop's own. false:
    weights only, and a run that is interrupted begins again."""
    keep_last: int | None = None
    """How many checkpoints are kept, the newest; empty: all."""
    keep_every: int | None = None
    """Beside those of `checkpoint.keep_last`, keep each whose step is a multiple of this."""
    asynchronous: bool = False
    """Copy the state to host memory, which has to have room for it once more, and write it while
    the next steps run."""
    grace_seconds: float = 300.0
    """After SIGTERM or SIGUSR1 the run saves at the end of its step; when this time has passed it
    leaves without."""

    def __post_init__(self):
        _at_least("checkpoint.every", self.every, 0)
        _at_least("checkpoint.keep_last", self.keep_last, 1)
        _at_least("checkpoint.keep_every", self.keep_every, 1)
        _positive("checkpoint.grace_seconds", self.grace_seconds)
        if self.keep_every and not self.keep_last:
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} has no effect without "
                "checkpoint.keep_last, since all are kept"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DebugConfig:
    """Looking into a run (`docs/debugging.md`)."""

    mode: Literal["train", "rollout"] = "train"
    """`rollout`: everything but the optimizer updates, for a look at prompts, rewards and speed."""
    dump_steps: tuple[int, ...] = ()
    """Steps, counted from 0, whose update is dumped to `dumps/` for `megatron-prepo replay`."""
    dump_gradients: bool = True
    """A dump holds the gradients too: 4 bytes a parameter and update."""
    max_skip_dumps: int = 3
    """So many of the updates that are skipped are dumped; the others are only counted."""

    def __post_init__(self):
        _at_least("debug.max_skip_dumps", self.max_skip_dumps, 0)
        for step in self.dump_steps:
            _at_least("debug.dump_steps", step, 0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProfileConfig:
    """Traces of chosen steps, for Perfetto or chrome://tracing, in `profile/` of the run."""

    steps: tuple[int, ...] = ()
    """Steps that are traced, counted from 0 as in `metrics.jsonl`; a traced step is slower."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that are traced."""
    stacks: bool = False
    """Python's call stacks, too."""

    def __post_init__(self):
        for name in ("steps", "ranks"):
            for value in getattr(self, name):
                _at_least(f"profile.{name}", value, 0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """A run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    selection: SelectionConfig
    rollout: RolloutConfig
    train: TrainConfig
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
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    debug: DebugConfig = dataclasses.field(default_factory=DebugConfig)
    megatron: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Passed to megatron-core under its own names: fields of TransformerConfig,
    DistributedDataParallelConfig and OptimizerConfig; any other name, and a value that is not of
    the field's type, is an error."""
    sglang: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Passed to the SGLang servers that the run starts, under SGLang's own names:
    `mem_fraction_static: 0.8` becomes `--mem-fraction-static 0.8`, `true` a bare flag, and empty
    takes one of our own out.  SGLang's own parser checks them before anything starts.  The
    embedded engine, and servers that run already, take none, and the run says so."""

    def __post_init__(self):
        for key in self.sglang:
            if key.replace("-", "_").endswith("api_key"):
                raise ValueError(
                    f"sglang.{key} would be in config.yaml and in the server's log; the run's own "
                    "servers listen on servers.host, which is this machine unless changed"
                )
        rollouts = self.selection.num_selected * self.rollout.samples_per_prompt
        if self.train.mini_batches > self.selection.num_selected:
            raise ValueError(
                f"train.mini_batches={self.train.mini_batches} is more than "
                f"selection.num_selected={self.selection.num_selected}; each needs a group"
            )
        if self.parallel.data and self.parallel.data * self.train.mini_batches > rollouts:
            raise ValueError(
                f"parallel.data={self.parallel.data} and train.mini_batches="
                f"{self.train.mini_batches} leave ranks without one of the {rollouts} rollouts "
                "of a step"
            )
        if self.train.overlap:
            self._check_overlap()
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
        if late := [s for s in self.profile.steps if s >= self.train.total_steps]:
            raise ValueError(
                f"profile.steps={late}: train.total_steps={self.train.total_steps} steps are "
                "counted from 0, and have none of that number"
            )

    def _check_decay(self):
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
                f"train.total_steps={total_steps}, and optimizer.min_lr=0: the steps after it "
                f"would learn nothing; set optimizer.lr_decay_steps={total_steps}, or a rate for "
                "them by optimizer.min_lr"
            )

    def _check_overlap(self):
        if self.rollout.engine == "embedded":
            raise ValueError(
                "train.overlap=true needs servers that generate while the actor trains, and "
                "rollout.engine=embedded computes in the actor's processes; set "
                "rollout.engine=sglang, or train.overlap=false"
            )
        if self.selection.method in ("greso", "dapo", "oracle"):
            raise ValueError(
                f"train.overlap=true chooses a step's prompts once and beforehand, and "
                f"selection.method={self.selection.method} has to see rollouts of a step to choose "
                "its prompts; set train.overlap=false, or another method"
            )
        if self.loss.importance == "off":
            raise ValueError(
                "train.overlap=true learns from rollouts of older weights, which loss.importance="
                "off does not correct for; set loss.importance=truncated (or masked)"
            )


def _at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and not value >= low:
        raise ValueError(f"{name}={value} must be at least {low}")


def _positive(name: str, value: float) -> None:
    if not value > 0:
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
    """A name, IPv4 or IPv6 address; as in a URL, it needs none of a URL's other parts."""
    try:
        usable = "%" not in str(ipaddress.ip_address(value))  # a scope has no place in a URL
    except ValueError:
        usable = re.fullmatch(r"[\w.-]+", value)
    if not usable:
        raise ValueError(
            f"{name}={value!r} must be a host name or an IP address, without port and brackets"
        )


def _no_secret(url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ValueError(f"servers.urls: {url!r} is no URL: {error}") from None
    if "@" in parts.netloc:
        raise ValueError(
            "servers.urls: a user or password in a URL would be in config.yaml and in logs; "
            "let a proxy on this machine add it"
        )
