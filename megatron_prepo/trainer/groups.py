"""Groups of rollouts that a step has generated, with their rewards.

Letters: K selected prompts, G rollouts each, N = K*G rollouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_prepo.prepo.advantages import zero_variance
from megatron_prepo.records import Rollout
from megatron_prepo.rewards.pool import Grade


def reward_tensor(grades: Sequence[Grade]) -> torch.Tensor:
    """Return `rewards_N`."""
    return torch.tensor([grade.reward for grade in grades])


@dataclass(frozen=True)
class Groups:
    """K groups of G rollouts, in the order in which they were generated."""

    chosen: tuple[int, ...] = ()
    """Each group's prompt, as a position among the candidates."""
    rollouts: tuple[Rollout, ...] = ()
    grades: tuple[Grade, ...] = ()
    """One per rollout."""

    @property
    def rewards_KG(self) -> torch.Tensor:
        """Rewards of the groups."""
        return reward_tensor(self.grades).view(len(self.chosen), -1)

    def extend(
        self, chosen: Sequence[int], rollouts: Sequence[Rollout], grades: Sequence[Grade]
    ) -> "Groups":
        """Return these groups followed by others."""
        return Groups((*self.chosen, *chosen), (*self.rollouts, *rollouts), (*self.grades, *grades))

    def select_for_training(self, num_groups: int) -> "Groups":
        """Return the first `num_groups` with an advantage; others fill up where there are too few.

        Those add nothing to the gradient, but the batch and so the loss's normaliser stay as large.
        """
        useless_K, group_size = zero_variance(self.rewards_KG), self.rewards_KG.shape[1]
        kept = sorted(useless_K.int().argsort(stable=True)[:num_groups].tolist())
        members = [k * group_size + g for k in kept for g in range(group_size)]
        return Groups(
            tuple(self.chosen[k] for k in kept),
            tuple(self.rollouts[i] for i in members),
            tuple(self.grades[i] for i in members),
        )

    def mini_batches(self, count: int) -> list[list[int]]:
        """Return the rollouts of each optimizer update, as positions in `rollouts`."""
        num_groups, group_size = self.rewards_KG.shape
        return mini_batches(num_groups, group_size, count)


def mini_batches(num_groups: int, group_size: int, count: int) -> list[list[int]]:
    """Return the rollouts of each optimizer update; groups are not split and are assigned in turn.

    In turn, since selected prompts are sorted by perplexity: every update sees all of the window.

    >>> mini_batches(3, 2, 2)
    [[0, 1, 4, 5], [2, 3]]
    """
    return [
        [k * group_size + g for k in range(first, num_groups, count) for g in range(group_size)]
        for first in range(count)
    ]
