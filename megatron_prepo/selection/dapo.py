"""DAPO's dynamic sampling (arXiv 2503.14476, sec. 3.2): roll out until K groups have an advantage.

    while fewer than K groups have 0 < #passes < G:  roll out more prompts, drop the other groups

It does not score prompts before the rollouts: groups without an advantage are generated and then
dropped.

As published (verl, recipe/dapo), each round is another full batch of the data loader, three times
the training batch in its scripts, and a run is aborted when a limit on the number of rounds is set
and reached.  Here a round is K of the step's candidates, drawn without replacement; the last round
has the remaining ones.  When all have been rolled out, the step trains on the groups that it has.
A group counts if its rewards differ at all, as in verl; for rewards of 0 and 1 this is the formula.
Surplus groups of the last round are dropped, as in verl.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

from megatron_prepo.config import SelectionConfig
from megatron_prepo.prepo.advantages import zero_variance
from megatron_prepo.records import Prompt
from megatron_prepo.selection.base import Candidates, Selector


class DynamicSampling(Selector):
    """Rounds of K candidates in random order; the first is identical to the choice of `random`."""

    refills = True

    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        self.num_selected, self.seed = config.num_selected, seed
        self.step: int | None = None
        self.waiting: list[int] = []
        """Candidates that this step has not rolled out, in the order in which they will be."""
        self.missing = self.rounds = 0

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return the positions of the next K candidates; none once K groups have an advantage."""
        if step != self.step:
            self.step, self.missing, self.rounds = step, self.num_selected, 0
            self.waiting = self._order(len(candidates.prompts))
        if self.missing <= 0 or not self.waiting:
            return []
        self.rounds += 1
        chosen = self.waiting[: self.num_selected]
        self.waiting = self.waiting[self.num_selected :]
        return chosen

    def observe(self, prompts: Sequence[Prompt], rewards_KG: torch.Tensor) -> None:
        """Count the groups with an advantage."""
        self.missing -= int((~zero_variance(rewards_KG)).sum())

    def metrics(self) -> dict[str, float]:
        """Return the number of rounds of the step."""
        return {"selection/rounds": self.rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next step from scratch, whatever its number."""
        self.step = None

    def _order(self, num_candidates: int) -> list[int]:
        draw = random.Random(f"{self.seed}/selection/{self.step}")
        first = draw.sample(range(num_candidates), self.num_selected)
        rest = sorted(set(range(num_candidates)) - set(first))
        draw.shuffle(rest)
        return first + rest
