"""GPUs, and what a step of RL costs on them: published numbers, each with its source.

Nothing here was measured by us.  A prediction is a range between two published runs of another
trainer (NeMo-RL with Megatron-Core and vLLM on H100), scaled as `predict_seconds` says; a run of
one's own takes their place (`measured`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU; rates are the vendor's peaks."""

    memory: int
    """Bytes that the driver offers (`nvidia-smi`)."""
    flops: float
    """Dense bfloat16 operations a second."""
    bandwidth: float
    """Bytes a second to and from memory."""
    nvlink: float
    """Bytes a second to the GPUs of the same machine, one direction."""
    source: str


GPUS = {
    "a100": Gpu(81920 * 2**20, 312e12, 2.039e12, 300e9, "NVIDIA A100 80GB SXM data sheet"),
    "h100": Gpu(81559 * 2**20, 989e12, 3.35e12, 450e9, "NVIDIA H100 SXM data sheet"),
    "h200": Gpu(143771 * 2**20, 989e12, 4.8e12, 450e9, "NVIDIA H200 SXM data sheet"),
    "b200": Gpu(183359 * 2**20, 2250e12, 8e12, 900e9, "NVIDIA DGX B200 data sheet, an eighth"),
}
DEVICE_NAMES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""What the driver calls them.  Cards of the same family that are slower (PCIe, NVL) have other
names, and no peak here."""
GPUS_PER_MACHINE = 8
NETWORK = 50e9
"""Bytes a second between machines for each GPU: a 400 Gb/s adapter each (DGX H100, H200, B200)."""


@dataclass(frozen=True)
class MeasuredRates:
    """Of one run; `gpus.Published` of one's own."""

    parameters: float
    gpu: str
    """Name in `gpus.GPUS`."""
    rates: dict[str, float]
    seconds: dict[str, float]
    """Of the weight sync."""
    source: str

    def rate(self, stage: str) -> float:
        """Active parameters times tokens, a second and GPU."""
        return self.rates[stage]


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The published peak of a device for products of this type; None where we know of none.

    >>> peak_flops("NVIDIA H200", "bfloat16"), peak_flops("NVIDIA H200", "float32")
    (989000000000000.0, None)
    """
    if dtype != "bfloat16" or device_name not in DEVICE_NAMES:
        return None
    return GPUS[DEVICE_NAMES[device_name]].flops


@dataclass(frozen=True)
class Published:
    """Seconds of the stages of a published step, and the work that was done in them."""

    parameters: float
    """All of them: what weight sync moves."""
    active: float
    """Those that a token sees."""
    gpus: int
    rollouts: int
    tokens: float
    """Mean tokens of a rollout; where only those generated are known, only those, so that the
    rates err on the slow side."""
    seconds: dict[str, float]
    source: str
    gpu: str = "h100"

    def rate(self, stage: str) -> float:
        """Active parameters times tokens, a second and GPU."""
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
    "github.com/NVIDIA-NeMo/RL docs/about/performance-summary.md (v0.4): the whole step; its parts "
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


@dataclass(frozen=True)
class StepWork:
    """What a step asks for, in tokens."""

    parameters: float
    active_parameters: float
    prompt_tokens: float
    """Of all candidates: what prompt perplexity reads."""
    generated_tokens: float
    scored_tokens: float
    """Prompts and completions whose old log-probabilities are taken."""
    learnt_tokens: float
    """Prompts and completions that the actor learns from."""
    bubble: float
    """Factor by which an idle pipeline lengthens scoring and learning."""


def published(experts: bool) -> tuple[Published, ...]:
    """The published runs of a kind of model."""
    return EXPERTS if experts else DENSE


def predict_seconds(
    work: StepWork, *, gpu: Gpu, gpus: int, runs: Sequence
) -> dict[str, tuple[float, float]]:
    """(fast, slow) seconds of each stage of a step, by the runs, `Published` or `MeasuredRates`.

    Work is parameters times tokens.  Rates scale with the number of GPUs; generation with the GPU's
    memory bandwidth over that of the run's, scoring and learning with its arithmetic: our scaling,
    not published.  Weight sync scales with all parameters, whatever the number of GPUs.  Perplexity
    is priced as scoring.
    """

    def seconds(stage: str, tokens: float, peak: str, factor: float = 1.0):
        work_done = work.active_parameters * tokens * factor / (gpus * getattr(gpu, peak))
        all_of = sorted(work_done * getattr(GPUS[run.gpu], peak) / run.rate(stage) for run in runs)
        return all_of[0], all_of[-1]

    syncs = sorted(work.parameters * run.seconds["weight_sync"] / run.parameters for run in runs)
    return {
        "perplexity": seconds("old_logprobs", work.prompt_tokens, "flops", work.bubble),
        "rollouts": seconds("rollouts", work.generated_tokens, "bandwidth"),
        "old_logprobs": seconds("old_logprobs", work.scored_tokens, "flops", work.bubble),
        "update": seconds("update", work.learnt_tokens, "flops", work.bubble),
        "weight_sync": (syncs[0], syncs[-1]),
    }


def bubble(pipeline: int, micro_batches: int, chunks: int = 1) -> float:
    """Length of a pipeline over its work: (m + (p - 1) / v) / m (arXiv 2104.04473, section 2.2).

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
    """Least seconds that an update waits for other GPUs, at the vendor's peak rates.

    Tensor parallelism: 4 all-reduces a layer of `tokens` x `hidden` bfloat16 numbers, two forward
    and two backward (arXiv 1909.08053, section 3), over NVLink.  Data parallelism: one of
    `gradient_bytes`, over NVLink inside a machine and the network between machines.  A ring moves
    2 (n - 1) / n of the bytes.  A pipeline sends a token's hidden state forth and its gradient
    back, from each of a rank's `chunks`, cut over the tensor ranks (sequence parallelism).
    Context parallelism (whose ranks are among `data`): so many numbers of a token and a layer are
    `exchanged`, forth and in backward, over NVLink where a row's ranks are on one machine.  It
    ranks layouts and is no part of the predicted seconds, since the published runs communicated
    too.
    """
    inside = math.prod((tensor, data)) <= GPUS_PER_MACHINE
    over = gpu.nvlink if inside else NETWORK
    # stages are the outermost: neighbours of a pipeline are on one machine only if all ranks are
    to_next = gpu.nvlink if math.prod((tensor, data, pipeline)) <= GPUS_PER_MACHINE else NETWORK
    messages = 2 * chunks * tokens * hidden * 2 / tensor if pipeline > 1 else 0

    def ring(ranks: int, num_bytes: float, rate: float) -> float:
        return 2 * (ranks - 1) / ranks * num_bytes / rate

    reduced = ring(tensor, 4 * layers * tokens * hidden * 2, gpu.nvlink)
    near = math.prod((tensor, context)) <= GPUS_PER_MACHINE  # behind tensor ranks the innermost
    exchanges = 2 * layers * tokens * exchanged * 2 / (gpu.nvlink if near else NETWORK)
    return reduced + exchanges + ring(data, gradient_bytes, over) + messages / to_next
