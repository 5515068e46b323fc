"""KGPS (arXiv 2607.27610): a Kalman filter on the logit of each prompt's pass rate.

    state        x_i = logit of the pass rate ~ N(m_i, v_i), at first N(0, v_0)
    drift        an update of the policy adds q u^2 to v_i, which never exceeds v_0; u is the size
                 of the update, relative to the mean of all so far
    observation  s passes of G: z = log((s + 1/2) / (G - s + 1/2)), with the variance
                 r = 1 / (s + 1/2) + 1 / (G - s + 1/2)
    filter       gain k = v / (v + r);  m <- m + k (z - m),  v <- (1 - k) v
    choose       the K with the largest E[p (1 - p)], p = sigmoid(x), by `NODES`-point quadrature

v_0 is `selection.kgps_prior_variance`, q `selection.kgps_drift`.  In the first
`selection.kgps_warm_up` steps the choice is random.

Of the paper, only the abstract could be read: a linear Gaussian model in logit space, noise that
grows with the update, and a posterior-expected utility that favours intermediate difficulty.  That
the utility is E[p (1 - p)] by 5-point Gauss-Hermite quadrature, after a uniform first epoch, is a
later paper's account of it.  The observation's variance, the size of an update, the cap and all
defaults are ours.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from megatron_prepo.config import SelectionConfig
from megatron_prepo.records import Prompt
from megatron_prepo.selection.base import Candidates, Selector

NODES = 5
"""Points of the Gauss-Hermite quadrature."""


class KalmanFilter(Selector):
    """Choice by expected variance of the reward, from a filtered pass rate."""

    needs_updates = True

    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        self.num_selected, self.seed, self.pass_reward = config.num_selected, seed, pass_reward
        self.prior_variance, self.warm_up = config.kgps_prior_variance, config.kgps_warm_up
        self.noise = config.kgps_drift
        self.drift = 0.0
        """Sum of q u^2 over all updates so far."""
        self.sizes, self.num_updates = 0.0, 0
        """Sum of the sizes of the steps' updates, and their number, without skipped ones."""
        self.beliefs: dict[str, tuple[float, float, float]] = {}
        """Per prompt id: m and v right after its last visit, and the drift at that time."""
        self.utility = 0.0

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return the positions of the K candidates, most useful first; ties keep their order."""
        beliefs = [self.belief(prompt.id) for prompt in candidates.prompts]
        mean_P, variance_P = np.array(beliefs).T
        utility_P = expected_variance(mean_P, variance_P)
        chosen: list[int] = np.argsort(-utility_P, kind="stable")[: self.num_selected].tolist()
        if step < self.warm_up:
            draw = random.Random(f"{self.seed}/kgps/{step}")
            chosen = draw.sample(range(len(candidates.prompts)), self.num_selected)
        self.utility = float(utility_P[chosen].mean())
        return chosen

    def observe(self, prompts: Sequence[Prompt], rewards_KG: torch.Tensor) -> None:
        """Filter the passes of each group."""
        passes_K = (rewards_KG >= self.pass_reward).sum(dim=1).tolist()
        for prompt, passes in zip(prompts, passes_K, strict=True):
            mean, variance = filtered(
                *self.belief(prompt.id), *observation(passes, rewards_KG.shape[1])
            )
            self.beliefs[prompt.id] = (mean, variance, self.drift)

    def observe_update(self, size: float) -> None:
        """Add the drift of the step's updates to every prompt's variance."""
        if size:  # 0: the step's updates were skipped, and changed nothing
            self.sizes, self.num_updates = self.sizes + size, self.num_updates + 1
            self.drift += self.noise * (size * self.num_updates / self.sizes) ** 2

    def belief(self, prompt_id: str) -> tuple[float, float]:
        """Return mean and variance of a prompt's logit, now."""
        if prompt_id not in self.beliefs:
            return 0.0, self.prior_variance
        mean, variance, drift_then = self.beliefs[prompt_id]
        return mean, min(variance + self.drift - drift_then, self.prior_variance)

    def metrics(self) -> dict[str, float]:
        """Return the mean utility of the chosen prompts, and the drift so far."""
        return {"selection/utility": self.utility, "selection/drift": self.drift}

    def state_dict(self) -> dict[str, Any]:
        """Return the beliefs by prompt id, and the drift with what it is relative to."""
        return {
            "beliefs": {name: list(belief) for name, belief in self.beliefs.items()},
            "drift": self.drift,
            "sizes": self.sizes,
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from saved beliefs."""
        self.beliefs = {name: tuple(belief) for name, belief in state["beliefs"].items()}
        self.drift, self.sizes = state["drift"], state["sizes"]
        self.num_updates = state["num_updates"]


def observation(passes: int, group_size: int) -> tuple[float, float]:
    """Return the observed logit and its variance (Haldane and Anscombe's, finite for any count)."""
    right, wrong = passes + 0.5, group_size - passes + 0.5
    return float(np.log(right / wrong)), 1 / right + 1 / wrong


def filtered(
    mean: float, variance: float, observed: float, observed_variance: float
) -> tuple[float, float]:
    """Return mean and variance after an observation.

    >>> filtered(0.0, 3.0, 2.0, 1.0)
    (1.5, 0.75)
    """
    gain = variance / (variance + observed_variance)
    return mean + gain * (observed - mean), (1 - gain) * variance


def expected_variance(mean_P: np.ndarray, variance_P: np.ndarray) -> np.ndarray:
    """Return E[p (1 - p)] of pass rates p whose logits are normal, `utility_P`."""
    node_N, weight_N = np.polynomial.hermite.hermgauss(NODES)
    rate_PN = expit(mean_P[:, None] + np.sqrt(2 * variance_P)[:, None] * node_N)
    utility_P: np.ndarray = (rate_PN * (1 - rate_PN) * weight_N).sum(axis=1) / np.sqrt(np.pi)
    return utility_P
