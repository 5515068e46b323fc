"""Baseline of the paper: K candidates drawn uniformly, without scoring."""

import random

from megatron_prepo.config import SelectionConfig
from megatron_prepo.selection.base import Candidates


class RandomChoice:
    """Uniform draw without replacement, a function of the seed and the step alone."""

    needs_scores = False
    needs_pass_rates = False
    refills = False

    def __init__(self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float):
        self.num_selected, self.seed = config.num_selected, seed

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return the positions of the K selected candidates."""
        draw = random.Random(f"{self.seed}/selection/{step}")
        return draw.sample(range(len(candidates.prompts)), self.num_selected)

    def observe(self, prompts, rewards_KG) -> None:
        """Ignore rewards."""

    def metrics(self) -> dict[str, float]:
        """Return no metrics."""
        return {}

    def state_dict(self) -> dict:
        """Return an empty state: a draw depends only on the seed and the step."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Do nothing: there is no state."""
