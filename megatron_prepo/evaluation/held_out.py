"""Held-out pass rate: avg@k, the mean over prompts of the fraction of k samples that pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_prepo.evaluation.pass_at_k import ci95, difference_ci95
from megatron_prepo.records import Prompt, Rollout


@dataclass(frozen=True)
class Evaluation:
    """Pass rates of the held-out prompts."""

    passes_P: torch.Tensor
    """Fraction of each prompt's samples that pass."""
    samples_per_prompt: int

    def first(self, count: int) -> "Evaluation":
        """Return the evaluation of the first `count` prompts."""
        return replace(self, passes_P=self.passes_P[:count])

    @property
    def pass_rate(self) -> float:
        """Mean of `passes_P`, avg@k."""
        return float(self.passes_P.mean())

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % interval of the pass rate over prompts of this kind."""
        return ci95(self.passes_P.tolist(), self.samples_per_prompt)

    def gain_ci95(self, before: "Evaluation") -> tuple[float, float]:
        """95 % interval of the gain over an evaluation of the same prompts."""
        samples = before.samples_per_prompt, self.samples_per_prompt
        return difference_ci95(before.passes_P.tolist(), self.passes_P.tolist(), samples)


def evaluate(
    generate: Callable[..., list[Rollout]],
    prompts: Sequence[Prompt],
    rewards_of: Callable[[Sequence[Rollout]], Sequence[float]],
    *,
    samples_per_prompt: int,
    pass_reward: float,
    **sampling: Any,
) -> Evaluation:
    """Return avg@k of the engine that `generate` uses; a sample passes from `pass_reward` on."""
    rollouts = generate(prompts, samples_per_prompt=samples_per_prompt, **sampling)
    rewards_PG = torch.as_tensor(rewards_of(rollouts)).view(len(prompts), samples_per_prompt)
    passes_P = (rewards_PG >= pass_reward).double().mean(dim=1)
    return Evaluation(passes_P, samples_per_prompt)
