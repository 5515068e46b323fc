"""The paper's baseline: K of the candidates uniformly, without looking at them."""

import random

from megatron_prepo.config import SelectionConfig
from megatron_prepo.selection.base import Candidates


class RandomChoice:
    """A uniform draw without replacement, from the seed and the step alone."""

    needs_scores = False
    needs_pass_rates = False
    refills = False

    def __init__(self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float):
        self.num_selected, self.seed = config.num_selected, seed

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Positions of the K selected candidates."""
        draw = random.Random(f"{self.seed}/selection/{step}")
        return draw.sample(range(len(candidates.prompts)), self.num_selected)

    def observe(self, prompts, rewards_KG) -> None:
        """Nothing is learnt."""

    def metrics(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict:
        """Nothing: a draw follows from the seed and the step."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""
