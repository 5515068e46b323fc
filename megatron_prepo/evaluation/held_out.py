"""Held-out pass rate: avg@k, the mean over prompts of the share of k samples that pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_prepo.evaluation.pass_at_k import (
    ci95,
    difference_ci95,
    mean_with_ci95,
    pass_at_k,
)
from megatron_prepo.records import Rollout
from megatron_prepo.rollout.engine import Engine, Request


@dataclass(frozen=True)
class Evaluation:
    """Pass rates of the held-out prompts."""

    passes_P: torch.Tensor
    """Share of each prompt's samples that pass."""
    samples_per_prompt: int

    def first(self, count: int) -> "Evaluation":
        """Return the same of the first prompts only."""
        return replace(self, passes_P=self.passes_P[:count])

    @property
    def pass_rate(self) -> float:
        """avg@k."""
        return float(self.passes_P.mean())

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % interval of the pass rate over prompts of this kind."""
        return ci95(self.passes_P.tolist(), self.samples_per_prompt)

    def pass_at(self, k: int) -> dict[str, Any]:
        """Return `mean` and `ci95` of the unbiased pass@k, for k up to the number of samples."""
        samples = self.samples_per_prompt
        passed_P = (self.passes_P * samples).round().int().tolist()
        # n samples are n / k independent draws of k
        return mean_with_ci95([[pass_at_k(samples, n, k) for n in passed_P]], samples // k)

    def gain_ci95(self, before: "Evaluation") -> tuple[float, float]:
        """95 % interval of the gain over an evaluation of the same prompts."""
        samples = before.samples_per_prompt, self.samples_per_prompt
        return difference_ci95(before.passes_P.tolist(), self.passes_P.tolist(), samples)


def evaluate(
    engine: Engine,
    request: Request,
    rewards_of: Callable[[Sequence[Rollout]], torch.Tensor],
    *,
    pass_reward: float,
) -> Evaluation:
    """Return the engine's avg@k on the request's prompts; a sample passes at `pass_reward`."""
    rewards_N = rewards_of(engine.generate(request))
    rewards_PG = rewards_N.view(len(request.prompts), request.samples_per_prompt)
    passes_P = (rewards_PG >= pass_reward).double().mean(dim=1)
    return Evaluation(passes_P, request.samples_per_prompt)
