"""What the trainer asks of an engine, whichever it is; `build.py` makes the configured one.

Every rank calls the same methods, and results are complete and in order on every rank.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatron_prepo.records import Prompt, Rollout

Bucket = list[tuple[str, torch.Tensor]]
"""Tensors to be sent together, under Hugging Face names."""
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of every tensor of a sync."""
Sample = tuple[str, int]
"""One of the G rollouts of a prompt: the prompt's id, and a number from 0 to G - 1."""


class EngineError(RuntimeError):
    """The engine cannot continue; the message names its parts and what happened at each."""


class SyncBroken(EngineError):
    """A part of the engine was lost in a weight sync that needs all; it can be tried again."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Rollouts to generate, and what to do with them as they come."""

    prompts: Sequence[Prompt]
    samples_per_prompt: int
    temperature: float
    max_new_tokens: int
    seed: str
    """Names the random numbers: each prompt and sample has its own, and any other seed others."""
    routing: bool = False
    """Whether rollouts are to have the experts of their tokens (`Rollout.routing`)."""
    cached: Mapping[Sample, Rollout] = field(default_factory=dict)
    """Rollouts that are taken from here and not generated again."""
    on_rollouts: Callable[[dict[Sample, Rollout]], None] = lambda rollouts: None
    """Called with rollouts as they are generated, maybe in another thread, one call at a time; on
    one of the ranks for each."""
    on_progress: Callable[[int, int], None] = lambda done, total: None
    """Called with about how many of how many rollouts all ranks have generated."""

    def samples(self) -> list[tuple[Prompt, int]]:
        """Return prompt and sample number of each rollout, in the order of the result."""
        return [(prompt, n) for prompt in self.prompts for n in range(self.samples_per_prompt)]


class PendingRollouts:
    """Rollouts that are being generated."""

    def __init__(self, wait: Callable[[], tuple[list[Rollout], float]]):
        """`wait`: collective, returns the rollouts and the seconds that they took."""
        self._wait = wait
        self.seconds = 0.0
        """How long they took, once there is a result."""

    def result(self) -> list[Rollout]:
        """Wait for the rollouts; collective."""
        rollouts, self.seconds = self._wait()
        return rollouts


class Engine(Protocol):
    """Generates rollouts by weights that it gets from the actor."""

    weight_version: int | None
    """Optimizer updates behind the weights; None before the first sync and after a failed one."""
    verified: bool
    """Whether its weights, as they are served, have been compared with the actor's."""
    fp32_lm_head: bool
    """Whether its logits are float32: as it has them, not as it was told to have them."""

    def load_weights(self, buckets: Iterable[Bucket], version: int, shapes: Shapes) -> None:
        """Replace all weights by those of the buckets, whose tensors have these shapes.

        Raises EngineError on every rank, and SyncBroken where trying again may help.
        """

    def generate(self, request: Request) -> list[Rollout]:
        """Return the rollouts of the request, in their prompts' order.

        Raises EngineError on every rank.
        """

    def score_prompts(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Return log-probabilities, at temperature 1, of each prompt's tokens but the first."""

    def prompt_logprobs(self, tokens: Sequence[int]) -> dict[str, list[float]]:
        """Return the same of one text, by the name of each part of the engine."""

    def close(self) -> None:
        """Leave nothing behind."""


class BackgroundEngine(Engine, Protocol):
    """An engine that generates while the actor learns (`train.overlap`)."""

    def start_generate(self, request: Request) -> PendingRollouts:
        """Begin `generate`; nothing else may be asked of the engine until its result is taken."""
