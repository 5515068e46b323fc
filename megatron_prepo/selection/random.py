"""Baseline of the paper: K candidates drawn uniformly, without scoring."""

import random

from megatron_prepo.config import SelectionConfig
from megatron_prepo.selection.base import Candidates, Selector


class RandomChoice(Selector):
    """Uniform draw without replacement, a function of the seed and the step alone."""

    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        self.num_selected, self.seed = config.num_selected, seed

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return the positions of the K selected candidates."""
        draw = random.Random(f"{self.seed}/selection/{step}")
        return draw.sample(range(len(candidates.prompts)), self.num_selected)
