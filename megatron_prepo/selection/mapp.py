"""MaPP (2026): sample prompts by the probability that their group has an advantage.

    pass rate of prompt i ~ Beta(alpha_i, beta_i), the posterior of `mopps.py`
    P(advantage) = 1 - E[p^G] - E[(1 - p)^G]
                 = 1 - B(alpha + G, beta) / B(alpha, beta) - B(alpha, beta + G) / B(alpha, beta)
    choose: K candidates without replacement, each time in proportion to P(advantage)

The method's other half, the advantage that the posterior predicts, is
`advantage.method=posterior` (`prepo/posterior_advantages.py`).

The discount of the posterior is `selection.mopps_decay`: MaPP's update and its default, 0.5, are
those of MoPPS.  G is that of the groups observed; before the first, all prompts are alike, whatever
G is.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_prepo.config import SelectionConfig
from megatron_prepo.records import Prompt
from megatron_prepo.selection.base import Candidates
from megatron_prepo.selection.mopps import PosteriorSampling


class PosteriorPredictive(PosteriorSampling):
    """Sampling in proportion to the predicted probability of an advantage."""

    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        super().__init__(config, total_steps=total_steps, seed=seed, pass_reward=pass_reward)
        self.group_size = 2
        self.informative = 0.0

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return the positions of the K candidates, in the order in which they were drawn."""
        alpha_P, beta_P = np.array([self.beta(prompt.id) for prompt in candidates.prompts]).T
        probability_P = informative(alpha_P, beta_P, self.group_size)
        # the first K of P clocks of these rates are a draw without replacement
        clock_P = np.random.default_rng([self.seed, step]).exponential(size=len(probability_P))
        chosen = np.argsort(clock_P / probability_P, kind="stable")[: self.num_selected]
        self.informative = float(probability_P[chosen].mean())
        positions: list[int] = chosen.tolist()
        return positions

    def observe(self, prompts: Sequence[Prompt], rewards_KG: torch.Tensor) -> None:
        """Update the posteriors, as MoPPS does."""
        super().observe(prompts, rewards_KG)
        self.group_size = rewards_KG.shape[1]

    def metrics(self) -> dict[str, float]:
        """Return the mean probability that a chosen prompt's group has an advantage."""
        return {"selection/informative": self.informative}

    def state_dict(self) -> dict[str, Any]:
        """Return the posteriors, by prompt id, and G."""
        return super().state_dict() | {"group_size": self.group_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from saved posteriors."""
        super().load_state_dict(state)
        self.group_size = state["group_size"]


def informative(alpha_P: np.ndarray, beta_P: np.ndarray, group_size: int) -> np.ndarray:
    """Return the probability that G rollouts neither all pass nor all fail, `probability_P`.

    As a product, B(alpha + G, beta) / B(alpha, beta) has the factors (alpha + i) / (alpha + beta +
    i) for i < G.  Both powers are 1 minus something: one is subtracted as such, so that a
    probability near 0 keeps its digits.

    >>> informative(np.array([1.0, 9.0]), np.array([1.0, 1.0]), 4).round(3)  # (G - 1) / (G + 1)
    array([0.6  , 0.306])
    """
    total_PG = (alpha_P + beta_P)[:, None] + np.arange(group_size)
    all_pass_P = np.log1p(-beta_P[:, None] / total_PG).sum(axis=1)
    all_fail_P = np.log1p(-alpha_P[:, None] / total_PG).sum(axis=1)
    larger_P, smaller_P = np.maximum(all_pass_P, all_fail_P), np.minimum(all_pass_P, all_fail_P)
    probability_P: np.ndarray = -np.expm1(larger_P) - np.exp(smaller_P)
    return probability_P
