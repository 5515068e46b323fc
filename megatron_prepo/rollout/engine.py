"""The interface of an engine; `build.py` makes the configured one.

Every rank calls the same methods and gets complete results in the same order.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from megatron_prepo.records import Prompt, Rollout

Bucket = list[tuple[str, torch.Tensor]]
"""Tensors to be sent together, under Hugging Face names."""
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of every tensor of a sync."""
Sample = tuple[str, int]
"""One of the rollouts of a prompt: the prompt's id, and a number from 0 on."""


class Tokenizer(Protocol):
    """What engines need of a tokenizer of `transformers`."""

    eos_token_id: int | None

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Return the text of tokens."""


def result_here(future: Future[Any] | None) -> Any:
    """Return the result of a future: `share` of a job with one rank."""
    assert future is not None, "a single rank is rank 0"
    return future.result()


class EngineError(RuntimeError):
    """The engine cannot continue; the message names its parts and what happened at each."""


class SyncBroken(EngineError):
    """A server failed during a weight sync that needs all of them; the sync can be tried again."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Rollouts to generate, and callbacks for them as they arrive."""

    prompts: Sequence[Prompt]
    samples_per_prompt: int | Sequence[range]
    """Number of samples of each prompt; or the numbers of each prompt's samples, if they differ."""
    temperature: float
    """0: greedy.  Log-probabilities are then those at temperature 1."""
    max_new_tokens: int
    seed: str
    """Text from which the random numbers of each prompt and sample are derived."""
    top_p: float = 1.0
    """Probability of the most probable tokens among which to choose; 1: all."""
    top_k: int | None = None
    """Number of the most probable tokens among which to choose; None: all."""
    routing: bool = False
    """Whether rollouts must record the experts of their tokens (`Rollout.routing`)."""
    cached: Mapping[Sample, Rollout] = field(default_factory=dict)
    """Rollouts to reuse instead of generating them."""
    on_rollouts: Callable[[dict[Sample, Rollout]], None] = lambda rollouts: None
    """Called with rollouts as they are generated, possibly in another thread, one call at a time,
    and on one rank per rollout."""
    on_progress: Callable[[int, int], None] = lambda done, total: None
    """Called with the approximate number of generated rollouts of all ranks, and the total."""

    def samples(self) -> list[tuple[Prompt, int]]:
        """Return prompt and sample number of each rollout, in the order of the result."""
        each = self.samples_per_prompt
        numbers = [range(each)] * len(self.prompts) if isinstance(each, int) else each
        return [
            (p, n) for p, of_prompt in zip(self.prompts, numbers, strict=True) for n in of_prompt
        ]


class PendingRollouts:
    """Rollouts that are being generated."""

    def __init__(self, wait: Callable[[], tuple[list[Rollout], float]]) -> None:
        """`wait` is collective and returns the rollouts and the seconds that they took."""
        self._wait = wait
        self.seconds = 0.0
        """Duration of the generation; 0 until `result` returns."""

    def result(self) -> list[Rollout]:
        """Wait for the rollouts; collective."""
        rollouts, self.seconds = self._wait()
        return rollouts


class Engine(Protocol):
    """Generates rollouts with weights that it gets from the actor."""

    weight_version: int | None
    """Number of optimizer updates in the weights; None before the first and after a failed sync."""
    verified: bool
    """Whether the served weights have been compared with the actor's."""
    fp32_lm_head: bool | None
    """Whether its logits are float32, as observed, not as configured; None for a float32 model."""

    def load_weights(self, buckets: Iterable[Bucket], version: int, shapes: Shapes) -> None:
        """Replace all weights with those of the buckets, whose tensors have these shapes.

        Raises EngineError on every rank, and SyncBroken if another attempt may succeed.
        """

    def generate(self, request: Request) -> list[Rollout]:
        """Return the rollouts of the request, in the order of its prompts.

        Raises EngineError on every rank.
        """

    def score_prompts(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Return log-probabilities, at temperature 1, of each prompt's tokens but the first."""

    def prompt_logprobs(self, tokens: Sequence[int]) -> dict[str, list[float]]:
        """Return those of one text, by the name of each server or rank."""

    def close(self) -> None:
        """Release all resources and stop all processes of the engine."""


class BackgroundEngine(Engine, Protocol):
    """An engine that generates while the actor learns (`train.overlap`)."""

    def start_generate(self, request: Request) -> PendingRollouts:
        """Begin `generate`; call no other method of the engine before its result is taken."""
