"""Held-out pass rate: avg@k, the mean over prompts of the share of k samples that pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_prepo.config import Config
from megatron_prepo.evaluation.pass_at_k import (
    ci95,
    difference_ci95,
    mean_with_ci95,
    pass_at_k,
)
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rollout.engine import Engine, Request


@dataclass(frozen=True)
class Evaluation:
    """Pass rates of the held-out prompts."""

    passes_P: torch.Tensor
    """Share of each prompt's samples that pass."""
    samples_per_prompt: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Number of prompts of each named set, in the order of `passes_P`; empty: one set, unnamed."""

    def sets(self) -> dict[str, "Evaluation"]:
        """Return the evaluation of each named set."""
        parts = self.passes_P.split(list(self.sizes.values())) if self.sizes else ()
        return {
            name: Evaluation(passes_P, self.samples_per_prompt)
            for name, passes_P in zip(self.sizes, parts, strict=True)
        }

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


def pooled(sets: Mapping[str, Evaluation]) -> Evaluation:
    """Return the evaluation of all prompts together; a single set without a name stays as it is."""
    first, *_ = sets.values()
    if "" in sets:
        return first
    return Evaluation(
        torch.cat([of_set.passes_P for of_set in sets.values()]),
        first.samples_per_prompt,
        {name: len(of_set.passes_P) for name, of_set in sets.items()},
    )


def shared(before: Evaluation, after: Evaluation) -> tuple[Evaluation, Evaluation]:
    """Return both evaluations of the prompts that they share.

    `eval.max_prompts` takes the first prompts of each file, so the shorter evaluation's prompts of
    a set are among the longer one's.
    """
    sets = [evaluation.sets() or {"": evaluation} for evaluation in (before, after)]
    both = {name: min(len(of[name].passes_P) for of in sets) for name in sets[0]}
    first, last = (
        pooled({name: of[name].first(count) for name, count in both.items()}) for of in sets
    )
    return first, last


def evaluation_request(
    config: Config,
    prompts: Sequence[Prompt],
    samples: int,
    on_progress: Callable[[int, int], None],
) -> Request:
    """Return the request of an evaluation, during training and by `megatron-prepo evaluate`.

    Its random numbers are the same each time.
    """
    return Request(
        prompts=prompts,
        samples_per_prompt=samples,
        **config.eval.sampling,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=f"{config.train.seed}/evaluation",
        on_progress=on_progress,
    )


def evaluate(
    engine: Engine,
    request: Request,
    rewards_of: Callable[[Sequence[Rollout]], torch.Tensor],
    *,
    pass_reward: float,
) -> Evaluation:
    """Return the engine's avg@k on the request's prompts; a sample passes at `pass_reward`."""
    rewards_N = rewards_of(engine.generate(request))
    rewards_PG = rewards_N.view(len(request.prompts), -1)
    passes_P = (rewards_PG >= pass_reward).double().mean(dim=1)
    return Evaluation(passes_P, rewards_PG.shape[1])
