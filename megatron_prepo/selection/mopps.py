"""MoPPS (arXiv 2507.04632): a posterior per prompt's pass rate, and the draws nearest to 1/2.

    pass rate of prompt i ~ Beta(alpha_i, beta_i), at first Beta(1, 1)
    choose: draw gamma_i from each candidate's posterior; the K nearest to gamma* are rolled out
    observe s passes of G:  alpha_i <- lambda alpha_i + (1 - lambda) 1 + s
                            beta_i  <- lambda beta_i  + (1 - lambda) 1 + G - s

gamma* is `selection.target_pass_rate`, lambda `selection.mopps_decay`: 1 keeps all evidence (the
published code's default), 0 only that of the last visit, 0.5 is the value in the Countdown and
Geometry3k scripts.  A prompt that is not rolled out keeps its posterior.

The update is that of the published code (thu-rllab/MoPPS, recipe/ours/mopps.py), with two
differences.  There, s is G times the group's mean accuracy or score; here, it is the number of
rewards that reach `reward.high`: the same for rewards of 0 and 1.  And its lines for alpha and beta
end in `... if n > 1 else 8`, which Python parses as a choice between the entire sum and 8: with one
rollout per prompt every posterior would be Beta(8, 8).  No such case is needed here, since G is at
least 2.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

from megatron_prepo.config import SelectionConfig
from megatron_prepo.records import Prompt
from megatron_prepo.selection.base import Candidates, Selector

PRIOR = 1.0
"""alpha and beta of an unseen prompt: a uniform distribution of the pass rate."""


class PosteriorSampling(Selector):
    """Thompson sampling for a target pass rate."""

    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        self.num_selected, self.target = config.num_selected, config.target_pass_rate
        self.decay, self.seed, self.pass_reward = config.mopps_decay, seed, pass_reward
        self.posterior: dict[str, tuple[float, float]] = {}
        """alpha and beta by prompt id, of prompts that have been rolled out."""
        self.posterior_mean = 0.0

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return the positions of the K candidates, nearest draw first; ties keep their order."""
        draws_P = self.draw(candidates, step)
        nearest = sorted(range(len(draws_P)), key=lambda i: abs(draws_P[i] - self.target))
        chosen = nearest[: self.num_selected]
        self.posterior_mean = sum(self.mean(candidates.prompts[i].id) for i in chosen) / len(chosen)
        return chosen

    def draw(self, candidates: Candidates, step: int) -> list[float]:
        """Draw a pass rate from each candidate's posterior."""
        draw = random.Random(f"{self.seed}/mopps/{step}")
        return [draw.betavariate(*self.beta(prompt.id)) for prompt in candidates.prompts]

    def observe(self, prompts: Sequence[Prompt], rewards_KG: torch.Tensor) -> None:
        """Update the posteriors: earlier visits are discounted by lambda in favour of the prior."""
        passes_K = (rewards_KG >= self.pass_reward).sum(dim=1).tolist()
        for prompt, passes in zip(prompts, passes_K, strict=True):
            alpha, beta = (
                self.decay * count + (1 - self.decay) * PRIOR for count in self.beta(prompt.id)
            )
            self.posterior[prompt.id] = (alpha + passes, beta + rewards_KG.shape[1] - passes)

    def beta(self, prompt_id: str) -> tuple[float, float]:
        """Return alpha and beta of a prompt."""
        return self.posterior.get(prompt_id, (PRIOR, PRIOR))

    def mean(self, prompt_id: str) -> float:
        """Return the expected pass rate of a prompt."""
        alpha, beta = self.beta(prompt_id)
        return alpha / (alpha + beta)

    def metrics(self) -> dict[str, float]:
        """Return the expected pass rate of the selected prompts: the mean of posterior means."""
        return {"selection/posterior_mean": self.posterior_mean}

    def state_dict(self) -> dict[str, Any]:
        """Return the posteriors, by prompt id."""
        return {"posterior": {name: list(counts) for name, counts in self.posterior.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from saved posteriors."""
        self.posterior = {name: tuple(counts) for name, counts in state["posterior"].items()}
