"""Held-out pass rate: avg@k, the mean over prompts of the share of k samples that pass."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_prepo.records import Prompt, Rollout


@dataclass(frozen=True)
class Evaluation:
    """Pass rates of the held-out prompts."""

    passes_P: torch.Tensor
    """Share of each prompt's samples that pass."""

    @property
    def pass_rate(self) -> float:
        """avg@k."""
        return float(self.passes_P.mean())

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % interval of the pass rate over prompts of this kind."""
        return mean_ci95(self.passes_P)


def evaluate(
    generate: Callable[..., list[Rollout]],
    prompts: Sequence[Prompt],
    rewards_of: Callable[[Sequence[Rollout]], Sequence[float]],
    *,
    samples_per_prompt: int,
    pass_reward: float,
    **sampling,
) -> Evaluation:
    """avg@k of the engine whose `generate` is given; a sample passes at `pass_reward`."""
    rollouts = generate(prompts, samples_per_prompt=samples_per_prompt, **sampling)
    rewards_PG = torch.as_tensor(rewards_of(rollouts)).view(len(prompts), samples_per_prompt)
    return Evaluation((rewards_PG >= pass_reward).double().mean(dim=1))


def mean_ci95(values_P: torch.Tensor) -> tuple[float, float]:
    """Normal 95 % interval of a mean over prompts.

    Samples of a prompt are not independent, so the prompt is the unit: 1.96 standard errors of the
    prompts' means.
    """
    mean = float(values_P.mean())
    if len(values_P) < 2:
        return -math.inf, math.inf
    half = 1.96 * float(values_P.std()) / math.sqrt(len(values_P))
    return mean - half, mean + half
