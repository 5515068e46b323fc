"""Weight sync from the actor's shards to the engine, under Hugging Face names, in buckets.

The engine's log-probabilities of a prompt must equal the actor's, which proves that it uses the
weights it was sent.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_prepo.config import ModelConfig, WeightSyncConfig
from megatron_prepo.models.hf_files import HEAD, INDEX, SINGLE, HFTensors, buckets
from megatron_prepo.records import ScoredSequence
from megatron_prepo.rollout.engine import Engine, Shapes, SyncBroken

MAX_SYNC_ATTEMPTS = 3
"""Maximum attempts of a weight sync during which servers fail."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Default of `weight_sync.tolerance`, in nats per token, above which a run stops: a threshold for
monitoring, well above what correct implementations differ by (1e-6 in float32, up to 0.036 in
bfloat16), and no bound on rounding.  In bfloat16 a missing norm may pass it."""


class WeightSource(Protocol):
    """What a weight sync needs of the actor."""

    updates: int

    def hf_shapes(self) -> Shapes:
        """Return type and shape of every tensor, under Hugging Face names."""

    def hf_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor, under its Hugging Face name; collective."""

    def score(self, sequences: Sequence[ScoredSequence], *, temperature: float) -> list[Any]:
        """Return the scores of sequences; collective."""


def sync_weights(
    actor: WeightSource,
    engine: Engine,
    model: ModelConfig,
    settings: WeightSyncConfig,
    probe: Sequence[int],
    *,
    compare_files: bool = True,
) -> None:
    """Give the engine the actor's weights; afterwards its version is the actor's update count.

    Collective.  Verifies the weights with the tokens of `probe` as configured by
    `weight_sync.verify`.  The engine rejects unknown, repeated, missing and misshapen tensors.
    With `compare_files`, the first sync compares names and shapes with the files of `model.hf`;
    set it to False for a run that does not read their weights, which may be gone.
    """
    shapes = actor.hf_shapes()
    if engine.weight_version is None and compare_files:
        check_names(shapes, model.hf)
    load_weights(actor, engine, settings.bucket_mb << 20, shapes)
    if settings.verify == "always" or (settings.verify == "first" and not engine.verified):
        verify(actor, engine, probe, settings.tolerance or TOLERANCE[model.dtype])
        engine.verified = True


def load_weights(actor: WeightSource, engine: Engine, limit: int, shapes: Shapes) -> None:
    """Send all weights to the engine, in buckets of `limit` bytes.

    If a server fails, all weights are sent again, to the remaining and restarted servers.
    """
    for tries_left in reversed(range(MAX_SYNC_ATTEMPTS)):
        try:
            engine.load_weights(buckets(actor.hf_weights(), limit), actor.updates, shapes)
            return
        except SyncBroken:
            if not tries_left:
                raise


def check_names(shapes: Shapes, hf_directory: str | Path) -> None:
    """Raise ValueError unless names and shapes to be sent are those of the model's files.

    A server ignores unknown names and keeps tensors that are not sent, both silently.  Without
    weights in the directory (a run from a Megatron checkpoint), only `verify` checks the sync.
    """
    if not any((Path(hf_directory) / name).is_file() for name in (SINGLE, INDEX)):
        return
    with HFTensors(hf_directory, tied=HEAD not in shapes) as tensors:
        files = {name: place.shape for name, place in tensors.places.items()}
    unknown = [name for name in shapes if name not in files]
    # a tied model's files may repeat the embedding, and old files hold rotary frequencies
    missing = [
        name
        for name in files
        if name not in shapes and name != HEAD and not name.endswith("rotary_emb.inv_freq")
    ]
    misshapen = [
        f"{name} {tuple(shape)} for {tuple(files[name])}"
        for name, (_, shape) in shapes.items()
        if name in files and tuple(shape) != tuple(files[name])
    ]
    if unknown or missing or misshapen:
        raise ValueError(
            f"weight sync: the actor's tensors are not those of {hf_directory}: unknown there "
            f"{unknown[:5]}, not sent {missing[:5]}, of another shape {misshapen[:5]}"
        )


def verify(actor: WeightSource, engine: Engine, probe: Sequence[int], tolerance: float) -> float:
    """Compare actor and engine by the log-probabilities of the probe's tokens; collective.

    Returns the largest mean absolute difference of any server, in nats.  Raises ValueError,
    which names the server, for one above `tolerance`.
    """
    [scores] = actor.score([ScoredSequence(tuple(probe), start=1)], temperature=1.0)
    ours_T, worst = scores.logprobs_T, 0.0
    for name, theirs in engine.prompt_logprobs(probe).items():
        theirs_T = torch.tensor(theirs)
        difference_T = (theirs_T - ours_T).abs()
        mean, t = float(difference_T.mean()), int(difference_T.argmax())
        if not mean <= tolerance:  # also for NaN
            raise ValueError(
                f"weight sync: the log-probabilities of {name} differ from the actor's by "
                f"{mean:.2g} nats per token (weight_sync.tolerance={tolerance:g}), most at token "
                f"{t + 1}: {theirs_T[t]:.4f} for {ours_T[t]:.4f}; a tensor did not arrive, or "
                "arrived in the wrong place or type"
            )
        worst = max(worst, mean)
    return worst
