"""Seconds of a step of RL, predicted from the rates of other runs.

Nothing here was measured by us.  By default a prediction is a range between two published runs of
another trainer (NeMo-RL with Megatron-Core and vLLM on H100), scaled as `predict_seconds`
describes; the rates of a run of the user's replace them (`measured_rates`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from megatron_prepo.plan.gpus import GPUS, GPUS_PER_MACHINE, NETWORK, Gpu


@dataclass(frozen=True)
class MeasuredRates:
    """Rates measured in one run of the user's, in place of `Published` ones."""

    parameters: float
    gpu: str
    """Name in `gpus.GPUS`."""
    rates: dict[str, float]
    seconds: dict[str, float]
    """Seconds of the weight sync."""
    source: str

    def rate(self, stage: str) -> float:
        """Return active parameters times tokens, per second and GPU."""
        return self.rates[stage]


@dataclass(frozen=True)
class Published:
    """Seconds of the stages of a published step, and the work done in them."""

    parameters: float
    """All parameters, which weight sync transfers."""
    active: float
    """Parameters that a token uses."""
    gpus: int
    rollouts: int
    tokens: float
    """Mean tokens per rollout; if only generated tokens are published, only those, so that rates
    err on the slow side."""
    seconds: dict[str, float]
    source: str
    gpu: str = "h100"

    def rate(self, stage: str) -> float:
        """Return active parameters times tokens, per second and GPU."""
        work = self.active * self.rollouts * self.tokens
        return work / (self.seconds[stage] * self.gpus)


def _shares(total: float) -> dict[str, float]:
    # of a Qwen3-235B-A22B step: 60.4 %, 6.8 %, 31.6 % and 1.2 % (marin-community/marin issue 8653)
    return {
        "rollouts": 0.604 * total,
        "old_logprobs": 0.068 * total,
        "update": 0.316 * total,
        "weight_sync": 0.012 * total,
    }


_NEMO_959 = "github.com/NVIDIA-NeMo/RL issue 959, batch from its examples/configs"
_NEMO_V04 = (
    "github.com/NVIDIA-NeMo/RL docs/about/performance-summary.md (v0.4): the step; its parts "
    "by the shares in github.com/marin-community/marin issue 8653"
)
DENSE = (
    Published(
        parameters=8.03e9,
        active=8.03e9,
        gpus=8,
        rollouts=2048,
        tokens=795,
        seconds={"rollouts": 58, "old_logprobs": 18, "update": 28, "weight_sync": 5},
        source=f"published: Llama 3.1 8B on 8 H100 ({_NEMO_959})",
    ),
    Published(
        parameters=70.55e9,
        active=70.55e9,
        gpus=64,
        rollouts=2048,
        tokens=398,
        seconds={"rollouts": 84, "old_logprobs": 18, "update": 28, "weight_sync": 14},
        source=f"published: Llama 3.1 70B on 64 H100 ({_NEMO_959})",
    ),
)
EXPERTS = (
    Published(
        parameters=30.53e9,
        active=3.35e9,
        gpus=32,
        rollouts=2048,
        tokens=3154,
        seconds=_shares(225),
        source=f"published: Qwen3-30B-A3B on 32 H100 ({_NEMO_V04})",
    ),
    Published(
        parameters=235.09e9,
        active=22.19e9,
        gpus=128,
        rollouts=512,
        tokens=5671,
        seconds=_shares(506),
        source=f"published: Qwen3-235B-A22B on 128 H100 ({_NEMO_V04})",
    ),
)


ReferenceRun: TypeAlias = Published | MeasuredRates
"""A run whose rates predict those of another."""


@dataclass(frozen=True)
class StepWork:
    """The work of a step, in tokens."""

    parameters: float
    active_parameters: float
    prompt_tokens: float
    """Prompts of all candidates that are scored for perplexity."""
    generated_tokens: float
    scored_tokens: float
    """Prompts and completions whose old log-probabilities are computed."""
    trained_tokens: float
    """Prompts and completions that the actor trains on."""
    bubble: float
    """Factor by which idle time of the pipeline lengthens scoring and the update."""


def published(experts: bool) -> tuple[Published, ...]:
    """Return the published runs of dense models, or of models with experts."""
    return EXPERTS if experts else DENSE


def predict_seconds(
    work: StepWork,
    *,
    gpu: Gpu,
    gpus: int,
    runs: Sequence[ReferenceRun],
    engine_gpus: int | None = None,
) -> dict[str, tuple[float, float]]:
    """Return (fast, slow) seconds of each stage of a step, at the rates of the runs.

    `gpus` train, and `engine_gpus` generate (default: the same).

    Work is parameters times tokens.  Rates scale with the number of GPUs; generation also with the
    memory bandwidth relative to the run's GPU, scoring and the update with the arithmetic rate: our
    scaling, not published.  Weight sync scales with all parameters and not with the number of GPUs.
    Perplexity is predicted at the rate of scoring.
    """

    def seconds(
        stage: str, tokens: float, peak: str, factor: float = 1.0, on: int = gpus
    ) -> tuple[float, float]:
        work_done = work.active_parameters * tokens * factor / (on * getattr(gpu, peak))
        ordered = sorted(work_done * getattr(GPUS[run.gpu], peak) / run.rate(stage) for run in runs)
        return ordered[0], ordered[-1]

    syncs = sorted(work.parameters * run.seconds["weight_sync"] / run.parameters for run in runs)
    return {
        "perplexity": seconds("old_logprobs", work.prompt_tokens, "flops", work.bubble),
        "rollouts": seconds("rollouts", work.generated_tokens, "bandwidth", on=engine_gpus or gpus),
        "old_logprobs": seconds("old_logprobs", work.scored_tokens, "flops", work.bubble),
        "update": seconds("update", work.trained_tokens, "flops", work.bubble),
        "weight_sync": (syncs[0], syncs[-1]),
    }


def bubble(pipeline: int, micro_batches: int, chunks: int = 1) -> float:
    """Return a pipeline's time over its work: (m + (p - 1) / v) / m (arXiv 2104.04473, 2.2).

    >>> bubble(4, 8), bubble(4, 8, chunks=3)
    (1.375, 1.125)
    """
    return (micro_batches + (pipeline - 1) / chunks) / micro_batches


def communication_seconds(
    *,
    gpu: Gpu,
    tensor: int,
    data: int,
    layers: int,
    hidden: int,
    tokens: int,
    gradient_bytes: float,
    pipeline: int = 1,
    chunks: int = 1,
    context: int = 1,
    exchanged: float = 0,
) -> float:
    """Return the least seconds that an update waits for other GPUs, at the vendor's peak rates.

    Tensor parallelism: 4 all-reduces per layer of `tokens` x `hidden` bfloat16 numbers, two forward
    and two backward (arXiv 1909.08053, section 3), over NVLink.  Data parallelism: one all-reduce
    of `gradient_bytes`, over NVLink within a machine and the network between machines.  A ring
    moves 2 (n - 1) / n of the bytes.  A pipeline sends a token's hidden state forward and its
    gradient back, from each of a rank's `chunks`, divided over the tensor ranks (sequence
    parallelism).  Context parallelism (whose ranks are among `data`): `exchanged` numbers per token
    and layer are sent, in forward and in backward, over NVLink if a row's ranks are on one machine.
    The result ranks layouts and is not part of the predicted seconds, since the published runs
    include communication.
    """
    inside = math.prod((tensor, data)) <= GPUS_PER_MACHINE
    over = gpu.nvlink if inside else NETWORK
    # stages are outermost: neighbours of a pipeline are on one machine only if all ranks are
    to_next = gpu.nvlink if math.prod((tensor, data, pipeline)) <= GPUS_PER_MACHINE else NETWORK
    messages = 2 * chunks * tokens * hidden * 2 / tensor if pipeline > 1 else 0

    def ring(ranks: int, num_bytes: float, rate: float) -> float:
        return 2 * (ranks - 1) / ranks * num_bytes / rate

    reduced = ring(tensor, 4 * layers * tokens * hidden * 2, gpu.nvlink)
    near = math.prod((tensor, context)) <= GPUS_PER_MACHINE  # innermost after tensor ranks
    exchanges = 2 * layers * tokens * exchanged * 2 / (gpu.nvlink if near else NETWORK)
    return reduced + exchanges + ring(data, gradient_bytes, over) + messages / to_next
