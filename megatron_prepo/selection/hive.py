"""HIVE (arXiv 2603.25184): GRESO's history as prior, then a band of the current prompt entropy.

    stage 1   accept prompt i with probability max(p^z_i, 0.01): z and p as in `greso.py`
    stage 2   of the accepted prompts, keep those whose mean prompt entropy under the current policy
              lies between two quantiles: from the median up, or `selection.hive_band`
    rollouts  the first round has 1.5 K prompts, refills as in `greso.py`

The main text keeps the upper half; the configuration of its experiments discards the highest
quarter and keeps the next half: `selection.hive_band=[0.25,0.75]`.  The general form of stage 1
also weighs the entropy of earlier responses, with weight 0 in the experiments; it is not
implemented.

Of the paper we could read the abstract; the rest is from the notes of a reimplementation
(silverstarss/SignalForge, docs/hive), which quote its sections 3.2, 3.3 and B.3.  There, groups of
equal rewards count as easy at 1 and as hard at 0.1; here by `reward.high`, as in `greso.py`.
There, the quantiles are of batches of 32 prompts; here of all accepted candidates of the step.
"""

import numpy as np

from megatron_prepo.config import SelectionConfig
from megatron_prepo.selection.base import Candidates
from megatron_prepo.selection.greso import GRESO

P_LEAST = 0.01
"""Smallest probability of a prompt."""


class HistoryAndEntropy(GRESO):
    """Random skipping by history, then selection by prompt entropy; refills like GRESO."""

    needs_scores = True

    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        super().__init__(config, total_steps=total_steps, seed=seed, pass_reward=pass_reward)
        self.band, self.outside = config.hive_band, 0

    def acceptance(self, prompt_id: str) -> float:
        """Return the probability of stage 1."""
        return max(super().acceptance(prompt_id), P_LEAST)

    def order(self, candidates: Candidates, accepted: list[int]) -> tuple[list[int], list[int]]:
        """Split the accepted positions: within the band of the entropy, and outside."""
        assert candidates.entropy_P is not None, "needs_scores"
        kept_A = in_band(candidates.entropy_P[accepted].numpy(), *self.band)
        inside = [i for i, kept in zip(accepted, kept_A, strict=True) if kept]
        outside = [i for i, kept in zip(accepted, kept_A, strict=True) if not kept]
        self.outside = len(outside)
        return inside, outside

    def metrics(self) -> dict[str, float]:
        """Return GRESO's, and the number of accepted candidates outside the band."""
        return super().metrics() | {"selection/outside_band": self.outside}


def in_band(entropy_A: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return a mask of the values between two quantiles, both included: ties are kept together.

    What is not finite is outside, and counts for no quantile.

    >>> in_band(np.array([3.0, 1.0, 2.0, 2.0]), 0.5, 1.0)
    array([ True, False,  True,  True])
    """
    finite_A: np.ndarray = np.isfinite(entropy_A)
    if not finite_A.any():
        return finite_A
    least, most = np.quantile(entropy_A[finite_A], [low, high])
    kept_A: np.ndarray = finite_A & (entropy_A >= least) & (entropy_A <= most)
    return kept_A
