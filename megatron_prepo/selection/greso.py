"""GRESO (arXiv 2506.02177): skip prompts whose last visits had zero variance; refill like DAPO.

    P(roll out prompt i) = p_easy^z  or  p_hard^z,   z = its latest consecutive visits that were all
                                                         right, or all wrong (zero variance)
    after a step:   p_easy -= 0.01 if #easy / #generated >= 25 % / 3     else p_easy += 0.01
                    p_hard -= 0.01 if #hard / #generated >= 25 % * 2 / 3 else p_hard += 0.01
    first round:    1.5 K prompts (384 for 256)
    each refill:    min(1.5 K, ceil(1.25 * missing / (1 - alpha))),
                    alpha = #zero variance / #generated

The published code (Infini-AI-Lab/GRESO, verl/trainer/ttis) differs from its paper and from ours:

- It treats a mean reward of at least 0.98 as all right and of at most 0.11 as all wrong, which fits
  rewards of 0, 0.1 and 1 and 8 rollouts: 1 right of 16 is 0.06, and would be all wrong.  We compare
  the rewards themselves.  It counts only hard groups of reward 0.1; we count those of any reward.
- A prompt keeps a probability of at least 0.01, and the p's stay between 0.05 and 0.95.  We apply
  only the second bound.
- The p's are constant in the first epoch.  Ours are updated from the first step.
- It computes alpha from the last round, a refill has 64 prompts or more, and a round whose estimate
  falls below 1.5 K is the last, filled or not.  We compute alpha over the step, use at least one
  prompt per refill, and continue until K groups have an advantage or no candidate remains.

There, a skipped prompt is replaced by the next one of the data set.  Here, only the P candidates of
the step are available: if fewer than K of them are accepted, skipped ones are added.
"""

import copy
import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch

from megatron_prepo.config import SelectionConfig
from megatron_prepo.prepo.advantages import zero_variance
from megatron_prepo.records import Prompt
from megatron_prepo.selection.base import Candidates, Selector

TARGET = {"easy": Fraction(1, 4) / 3, "hard": Fraction(1, 4) * 2 / 3}
"""Target share of generated groups that are all right, and all wrong: 25 % together."""
P_START, P_STEP, P_MIN, P_MAX = 0.5, 0.01, 0.05, 0.95
FIRST_ROUND = 1.5
SPARE = Fraction(5, 4)
"""Factor by which a refill exceeds the estimate."""


class GRESO(Selector):
    """Random skipping of prompts that had zero variance; refills in rounds of adaptive size."""

    refills = True

    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        self.num_selected, self.seed, self.pass_reward = config.num_selected, seed, pass_reward
        self.p = {kind: P_START for kind in TARGET}
        self.z: dict[str, dict[str, int]] = {kind: {} for kind in TARGET}
        """z of each kind by prompt id; z is 0 for a prompt without an entry."""
        self.step: int | None = None
        self.waiting: list[int] = []
        """Candidates of this step that may still be rolled out, in the order of the rounds."""
        self.found = {kind: 0 for kind in TARGET}
        self.paid = self.skipped = 0

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return the positions of the next round.

        The list is empty, which ends the step, if K groups have an advantage or no candidate
        remains.
        """
        if step != self.step:
            self.step, self.paid, self.found = step, 0, {kind: 0 for kind in TARGET}
            self._accept_or_skip(candidates)
        useful = self.paid - sum(self.found.values())
        if useful >= self.num_selected or not self.waiting:
            self._adapt()
            return []
        size = round_size(self.num_selected, useful, self.paid)
        chosen, self.waiting = self.waiting[:size], self.waiting[size:]
        return chosen

    def observe(self, prompts: Sequence[Prompt], rewards_KG: torch.Tensor) -> None:
        """Update z: a group of equal rewards increments its kind's z and resets the other kind's.

        A group with an advantage resets both.
        """
        self.paid += len(prompts)
        useless_K = zero_variance(rewards_KG).tolist()
        passed_K = (rewards_KG[:, 0] >= self.pass_reward).tolist()
        for prompt, useless, passed in zip(prompts, useless_K, passed_K, strict=True):
            before = {kind: z.pop(prompt.id, 0) for kind, z in self.z.items()}
            if useless:
                kind = "easy" if passed else "hard"
                self.z[kind][prompt.id] = before[kind] + 1
                self.found[kind] += 1

    def acceptance(self, prompt_id: str) -> float:
        """Return P(roll out the prompt): p^z of its kind; the other kind's z is 0."""
        return math.prod(p ** self.z[kind].get(prompt_id, 0) for kind, p in self.p.items())

    def _accept_or_skip(self, candidates: Candidates) -> None:
        draw = random.Random(f"{self.seed}/greso/{self.step}")
        order = draw.sample(range(len(candidates.prompts)), len(candidates.prompts))
        accepted: list[int] = []
        skipped: list[int] = []
        for i in order:
            accepts = draw.random() < self.acceptance(candidates.prompts[i].id)
            (accepted if accepts else skipped).append(i)
        self.skipped = len(skipped)
        first, spare = self.order(candidates, accepted)
        self.waiting = first + (spare + skipped)[: max(0, self.num_selected - len(first))]

    def order(self, candidates: Candidates, accepted: list[int]) -> tuple[list[int], list[int]]:
        """Return the accepted positions to roll out, and those only if there are too few."""
        return accepted, []

    def _adapt(self) -> None:
        for kind, target in TARGET.items():
            down = Fraction(self.found[kind], self.paid) >= target
            moved = self.p[kind] + (-P_STEP if down else P_STEP)
            self.p[kind] = min(max(moved, P_MIN), P_MAX)

    def metrics(self) -> dict[str, float]:
        """Return the base probabilities for the next step, and the number of skipped candidates."""
        return {
            "selection/p_easy": self.p["easy"],
            "selection/p_hard": self.p["hard"],
            "selection/skipped": self.skipped,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the base probabilities, and z by prompt id."""
        return copy.deepcopy({"p": self.p, "z": self.z})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state at the start of a step."""
        self.p, self.z = copy.deepcopy((state["p"], state["z"]))
        self.step = None


def round_size(num_selected: int, useful: int, paid: int) -> int:
    """Return the number of prompts to roll out next, given `useful` groups among `paid` generated.

    With 16 useful of 24 and K = 32, 16 are missing, and two of three are useful:
    1.25 * 16 / (2 / 3) = 30.

    >>> round_size(32, 0, 0), round_size(32, 16, 24), round_size(32, 31, 48), round_size(32, 0, 48)
    (48, 30, 2, 48)
    """
    largest = math.ceil(FIRST_ROUND * num_selected)
    if not useful:
        return largest
    estimate = SPARE * (num_selected - useful) / Fraction(useful, paid)
    return min(largest, math.ceil(estimate))
