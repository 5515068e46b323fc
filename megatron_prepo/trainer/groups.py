"""Groups of rollouts that a step has generated, with their rewards.

Letters: K selected prompts, G rollouts each, N rollouts: K*G, unless the method lets groups differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from megatron_prepo.prepo.advantages import zero_variance
from megatron_prepo.prepo.group_rows import Rows, as_rows
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.trainer.overlong import KEEP, Overlong


def reward_tensor(grades: Sequence[Grade]) -> torch.Tensor:
    """Return `reward_N`."""
    return torch.tensor([grade.reward for grade in grades])


@dataclass(frozen=True)
class Groups:
    """K groups of rollouts, in the order in which they were begun."""

    chosen: tuple[int, ...] = ()
    """Each group's prompt, as a position among the candidates."""
    sizes: tuple[int, ...] = ()
    """Number of rollouts of each group."""
    rollouts: tuple[Rollout, ...] = ()
    """Rollouts, group by group."""
    grades: tuple[Grade, ...] = ()
    """One per rollout."""
    overlong: Overlong = KEEP
    """Treatment of completions that are cut off."""

    @property
    def reward_N(self) -> torch.Tensor:
        """Rewards as the reward function returned them."""
        return reward_tensor(self.grades)

    @property
    def rewards(self) -> Rows:
        """The same by group: `rewards_KG`, or K tensors if the groups differ in size."""
        return as_rows(self.reward_N, self.sizes)

    @property
    def penalties(self) -> list[float]:
        """What `rollout.overlong=penalty` adds to each rollout's reward, from -1 to 0."""
        return [self.overlong.penalty(len(rollout.tokens)) for rollout in self.rollouts]

    @property
    def shaped_reward_N(self) -> torch.Tensor:
        """Rewards from which advantages are computed: penalties are added."""
        if self.overlong.method != "penalty":
            return self.reward_N
        return self.reward_N + torch.tensor(self.penalties)

    @property
    def shaped_rewards(self) -> Rows:
        """The same by group."""
        return as_rows(self.shaped_reward_N, self.sizes)

    @property
    def masked(self) -> list[bool]:
        """Whether each rollout is removed from the update (`rollout.overlong=mask`)."""
        if self.overlong.method != "mask":
            return [False] * len(self.rollouts)
        return [self.overlong.masks(rollout.finished) for rollout in self.rollouts]

    @property
    def members(self) -> list[range]:
        """Positions of each group's rollouts."""
        return members(self.sizes)

    @property
    def prompts(self) -> list[Prompt]:
        """Prompt of each group."""
        return [self.rollouts[of_group[0]].prompt for of_group in self.members]

    def extend(
        self,
        chosen: Sequence[int],
        rollouts: Sequence[Rollout],
        grades: Sequence[Grade],
        sizes: Sequence[int] | None = None,
    ) -> "Groups":
        """Return these groups and others; rollouts of a prompt that has a group are added to it.

        `sizes`: number of rollouts of each prompt in `chosen`; by default they are equal.
        """
        sizes = sizes or [len(rollouts) // len(chosen)] * len(chosen)
        further = Groups(tuple(chosen), tuple(sizes), tuple(rollouts), tuple(grades))
        graded: dict[int, list[tuple[Rollout, Grade]]] = {}
        for groups in (self, further):
            for position, of_group in zip(groups.chosen, groups.members, strict=True):
                pairs = [(groups.rollouts[i], groups.grades[i]) for i in of_group]
                graded.setdefault(position, []).extend(pairs)
        return replace(
            self,
            chosen=tuple(graded),
            sizes=tuple(len(pairs) for pairs in graded.values()),
            rollouts=tuple(rollout for pairs in graded.values() for rollout, _ in pairs),
            grades=tuple(grade for pairs in graded.values() for _, grade in pairs),
        )

    def select_for_training(self, num_groups: int) -> "Groups":
        """Return the first `num_groups` with an advantage; others fill up where there are too few.

        Those add nothing to the gradient, unless `advantage.method` is one that gives them an
        advantage, but the batch and so the loss's normaliser stay as large, if groups have one
        size.  Larger groups come first: a method has spent more on them.
        """
        masked, of_groups = self.masked, self.members
        useless_K = zero_variance(self.shaped_rewards).tolist()
        for k, of_group in enumerate(of_groups):
            useless_K[k] |= all(masked[i] for i in of_group)
        order = sorted(range(len(useless_K)), key=lambda k: (useless_K[k], -self.sizes[k]))
        kept = sorted(order[:num_groups])
        return replace(
            self,
            chosen=tuple(self.chosen[k] for k in kept),
            sizes=tuple(self.sizes[k] for k in kept),
            rollouts=tuple(self.rollouts[i] for k in kept for i in of_groups[k]),
            grades=tuple(self.grades[i] for k in kept for i in of_groups[k]),
        )

    def mini_batches(self, count: int) -> list[list[int]]:
        """Return the rollouts of each optimizer update, as positions in `rollouts`.

        Without those that are masked; a mini-batch of which nothing is left is no update.
        """
        masked = self.masked
        unmasked = (
            [i for i in index if not masked[i]] for index in mini_batches(self.sizes, count)
        )
        return [index for index in unmasked if index]


def members(sizes: Sequence[int]) -> list[range]:
    """Return the positions of the members of consecutive groups.

    >>> members([2, 1])
    [range(0, 2), range(2, 3)]
    """
    ends = accumulate(sizes)
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def mini_batches(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Return the rollouts of each optimizer update; groups are not split and are assigned in turn.

    In turn, since selected prompts are sorted by perplexity: every update sees all of the window.

    >>> mini_batches([2, 2, 2], 2)
    [[0, 1, 4, 5], [2, 3]]
    """
    of_groups = members(sizes)
    return [[i for of_group in of_groups[first::count] for i in of_group] for first in range(count)]
