"""GRESO (arXiv 2506.02177): skip prompts whose last visits taught nothing, then refill like DAPO.

    P(roll out prompt i) = p_easy^z  or  p_hard^z,   z = its latest visits in a row that were all
                                                         right, or all wrong (zero variance)
    after a step:   p_easy -= 0.01 if #easy / #paid >= 25 % / 3     else p_easy += 0.01
                    p_hard -= 0.01 if #hard / #paid >= 25 % * 2 / 3 else p_hard += 0.01
    first round:    1.5 K prompts (384 for 256)
    each refill:    min(1.5 K, ceil(1.25 * missing / (1 - alpha))),   alpha = #zero variance / #paid

Where the published code (Infini-AI-Lab/GRESO, verl/trainer/ttis) differs from its paper and from
us:

- It takes a mean reward of at least 0.98 for all right and at most 0.11 for all wrong, which fits
  rewards of 0, 0.1 and 1 and 8 rollouts: 1 right of 16 is 0.06, and would be all wrong.  We compare
  the rewards themselves.  Its count of hard groups knows only those of reward 0.1; ours, any.
- A prompt keeps a chance of 0.01, and the p's stay within 0.05 and 0.95.  We keep the second.
- The p's rest in the first epoch.  Ours move from the first step on: a visit is what counts.
- alpha is that of the last round, a refill has 64 prompts or more, and a round whose estimate falls
  below 1.5 K is the last, filled or not.  We take alpha over the step, at least one prompt, and go
  on until K groups have an advantage or no candidate is left.

A skipped prompt there gives way to the next of the data set.  Here the P candidates of the step are
all there is: if fewer than K of them are accepted, skipped ones fill up.
"""

import copy
import math
import random
from fractions import Fraction

from megatron_prepo.config import SelectionConfig
from megatron_prepo.prepo.advantages import zero_variance
from megatron_prepo.selection.base import Candidates, Selector

TARGET = {"easy": Fraction(1, 4) / 3, "hard": Fraction(1, 4) * 2 / 3}
"""Share of the paid groups that may be all right, and all wrong: 25 % together."""
P_START, P_STEP, P_MIN, P_MAX = 0.5, 0.01, 0.05, 0.95
FIRST_ROUND = 1.5
SPARE = Fraction(5, 4)
"""A refill is so much larger than the estimate."""


class GRESO(Selector):
    """Skips by chance what has had zero variance, and refills in rounds of adaptive size."""

    refills = True

    def __init__(self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float):
        self.num_selected, self.seed, self.pass_reward = config.num_selected, seed, pass_reward
        self.p = {kind: P_START for kind in TARGET}
        self.z: dict[str, dict[str, int]] = {kind: {} for kind in TARGET}
        """Of each kind, by prompt id; a prompt that is not there, or in neither, has z = 0."""
        self.step: int | None = None
        self.waiting: list[int] = []
        """Candidates of this step that may still be rolled out, in the order of their turn."""
        self.found = {kind: 0 for kind in TARGET}
        self.paid = self.skipped = 0

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Positions of the next round; none, and the step is over, if K groups have an advantage
        or nobody is waiting."""
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

    def observe(self, prompts, rewards_KG) -> None:
        """A group of equal rewards lengthens its prompt's z, and ends the other kind's."""
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
        """P(roll out the prompt): p^z of its kind; the other kind's z is 0."""
        return math.prod(p ** self.z[kind].get(prompt_id, 0) for kind, p in self.p.items())

    def _accept_or_skip(self, candidates: Candidates) -> None:
        draw = random.Random(f"{self.seed}/greso/{self.step}")
        order = draw.sample(range(len(candidates.prompts)), len(candidates.prompts))
        accepted, skipped = [], []
        for i in order:
            accepts = draw.random() < self.acceptance(candidates.prompts[i].id)
            (accepted if accepts else skipped).append(i)
        self.skipped = len(skipped)
        self.waiting = accepted + skipped[: max(0, self.num_selected - len(accepted))]

    def _adapt(self) -> None:
        for kind, target in TARGET.items():
            down = Fraction(self.found[kind], self.paid) >= target
            moved = self.p[kind] + (-P_STEP if down else P_STEP)
            self.p[kind] = min(max(moved, P_MIN), P_MAX)

    def metrics(self) -> dict[str, float]:
        """The base probabilities for the next step, and how many of the P candidates were skipped
        by chance in this one."""
        return {
            "selection/p_easy": self.p["easy"],
            "selection/p_hard": self.p["hard"],
            "selection/skipped": self.skipped,
        }

    def state_dict(self) -> dict:
        """The base probabilities, and z by prompt id."""
        return copy.deepcopy({"p": self.p, "z": self.z})

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state with a new step."""
        self.p, self.z = copy.deepcopy((state["p"], state["z"]))
        self.step = None


def round_size(num_selected: int, useful: int, paid: int) -> int:
    """Prompts to roll out next, `useful` groups of the `paid` ones having an advantage.

    16 of 24 leave 16 of 32 missing, and two of three are useful: 1.25 * 16 / (2 / 3) = 30.

    >>> round_size(32, 0, 0), round_size(32, 16, 24), round_size(32, 31, 48), round_size(32, 0, 48)
    (48, 30, 2, 48)
    """
    largest = math.ceil(FIRST_ROUND * num_selected)
    if not useful:
        return largest
    estimate = SPARE * (num_selected - useful) / Fraction(useful, paid)
    return min(largest, math.ceil(estimate))
