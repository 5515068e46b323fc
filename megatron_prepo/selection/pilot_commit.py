"""Pilot-Commit (arXiv 2605.26606): a few rollouts of each prompt, the rest where some pass.

    pilot    n rollouts of each of K random prompts, then of further ones, as long as those that
             pass, times G - n, leave some of the step's K G rollouts
    pass     a prompt whose pass rate in the pilot lies in `selection.pilot_band`
    commit   the rest of K G, in equal parts to the prompts that pass: where most pass, G - n
    evict    a prompt whose pass rate reached `selection.pilot_evict` comes after all others when it
             is offered again; one that is too hard keeps its chance

n is `selection.pilot_rollouts`; empty: a quarter of G, as in the paper's 16 of 64 and 32 of 128.
A step trains on the prompts that got more; if they are fewer than K, on others' pilots, too.

In the published code (databricks/pilot-commit, recipe/pc), a step has pilots of 3 K prompts in each
of up to 10 rounds, and then K prompts with 3 n more rollouts each, so that it generates more than
K G.  There, prompts that pass wait up to 4 steps in a buffer, and the step trains on pilots of
older weights, which are generated next to the commits; here, all rollouts of a step are from the
same weights.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from megatron_prepo.config import SelectionConfig
from megatron_prepo.config.schema import default_pilot
from megatron_prepo.records import Prompt
from megatron_prepo.selection.base import Candidates, Selector


class PilotCommit(Selector):
    """Rounds of pilots, and one that commits the rest of the step's rollouts."""

    refills = True
    shares_budget = True

    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        self.num_selected, self.seed, self.pass_reward = config.num_selected, seed, pass_reward
        self.pilot, self.band = config.pilot_rollouts, config.pilot_band
        self.evict_from = config.pilot_evict
        self.evicted: dict[str, None] = {}
        """Ids of evicted prompts, in their order."""
        self.step: int | None = None
        self.waiting: list[int] = []
        """Candidates without a pilot, in the order in which they will have one."""
        self.tried: dict[int, float] = {}
        """Pass rate in the pilot of candidates that have had it, by position."""
        self.mixed: list[int] = []
        """Those among them whose rewards differ."""
        self.sizes: Counter[int] = Counter()
        """Rollouts of each position in the step."""
        self.asked: list[int] = []
        """Positions of the current round."""
        self.group_size = self.left = self.num_committed = 0
        self.commits = False

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return the positions of a round of pilots, of the commit, or none at the end."""
        if step != self.step:
            self.step, self.tried, self.commits, self.num_committed = step, {}, False, 0
            self.mixed, self.sizes = [], Counter()
            self.waiting = self._order(candidates)
            self.asked = self._take(self.num_selected)
        elif self.commits or not self.left:
            self.asked = []
        else:
            self.asked = self._more_pilots()
            if not self.asked:
                self.commits, self.asked = True, self._committed()[: self.left]
                self.num_committed = len(self.asked)
        return list(self.asked)

    def group_sizes(self, prompts: Sequence[Prompt], group_size: int) -> list[int]:
        """Return the pilot's size for each prompt, or equal parts of the rest."""
        if not self.tried:  # the first round of a step
            self.group_size, self.left = group_size, self.num_selected * group_size
        sizes = [self._pilot_size()] * len(prompts)
        if self.commits:
            each, over = divmod(self.left, len(prompts))
            sizes = [each + (k < over) for k in range(len(prompts))]
        self.left -= sum(sizes)
        self.sizes.update(dict(zip(self.asked, sizes, strict=True)))
        return sizes

    def observe(self, prompts: Sequence[Prompt], rewards_KG: Sequence[torch.Tensor]) -> None:
        """Learn the pass rates of a round of pilots."""
        if self.commits:
            return
        for position, prompt, row in zip(self.asked, prompts, rewards_KG, strict=True):
            rate = float((row >= self.pass_reward).double().mean())
            self.tried[position] = rate
            if row.amin() < row.amax():
                self.mixed.append(position)
            self.evicted.pop(prompt.id, None)
            if rate >= self.evict_from:
                self.evicted[prompt.id] = None

    def passing(self) -> list[int]:
        """Return the positions of the prompts whose pilot passes, in the order of the pilots."""
        low, high = self.band
        return [position for position, rate in self.tried.items() if low <= rate <= high]

    def metrics(self) -> dict[str, float]:
        """Return the prompts with a pilot, with more, and evicted, and the largest group."""
        return {
            "selection/pilots": len(self.tried),
            "selection/committed": self.num_committed,
            "selection/evicted": len(self.evicted),
            "selection/largest_group": max(self.sizes.values(), default=0),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the ids of the evicted prompts."""
        return {"evicted": list(self.evicted)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next step from scratch, whatever its number."""
        self.evicted, self.step = dict.fromkeys(state["evicted"]), None

    def _pilot_size(self) -> int:
        return self.pilot or default_pilot(self.group_size)

    def _more_pilots(self) -> list[int]:
        """Return further prompts for a pilot; none once those that pass can use the rest."""
        num_passing = len(self.passing())
        if num_passing * (self.group_size - self._pilot_size()) >= self.left:
            return []
        return self._take(min(self.num_selected - num_passing, self.left // self._pilot_size()))

    def _committed(self) -> list[int]:
        """Return the prompts that pass; if there are none, those with an advantage, or K of all."""
        return self.passing() or self.mixed or list(self.tried)[: self.num_selected]

    def _take(self, count: int) -> list[int]:
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken

    def _order(self, candidates: Candidates) -> list[int]:
        """Return the candidates as `random` would draw them, the evicted ones last."""
        draw, num = random.Random(f"{self.seed}/selection/{self.step}"), len(candidates.prompts)
        first = draw.sample(range(num), self.num_selected)
        rest = sorted(set(range(num)) - set(first))
        draw.shuffle(rest)
        return sorted(first + rest, key=lambda i: candidates.prompts[i].id in self.evicted)
