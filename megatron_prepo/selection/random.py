"""The paper's baseline: K of the candidates uniformly, without looking at them."""

import random

import torch

from megatron_prepo.config import SelectionConfig


class RandomChoice:
    """A uniform draw without replacement, from the seed and the step alone."""

    needs_perplexity = False

    def __init__(self, config: SelectionConfig, *, total_steps: int, seed: int):
        self.num_candidates, self.num_selected = config.num_candidates, config.num_selected
        self.seed = seed

    def choose(self, ppl_P: torch.Tensor | None, step: int) -> tuple[list[int], None]:
        """Indices of the K selected candidates; there is no window."""
        draw = random.Random(f"{self.seed}/selection/{step}")
        return draw.sample(range(self.num_candidates), self.num_selected), None

    def observe(self, prompts, rewards_KG) -> None:
        """Nothing is learnt."""

    def state_dict(self) -> dict:
        """Nothing: a draw follows from the seed and the step."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""
