"""Groups of rollouts that a step has generated, with their rewards.

Letters: K selected prompts, G rollouts each, N = K*G rollouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_prepo.prepo.advantages import zero_variance
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.trainer.overlong import KEEP, Overlong


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
    overlong: Overlong = KEEP
    """Treatment of completions that are cut off."""

    @property
    def rewards_KG(self) -> torch.Tensor:
        """Rewards of the groups, as the reward function returned them."""
        return reward_tensor(self.grades).view(len(self.chosen), -1)

    @property
    def penalties(self) -> list[float]:
        """What `rollout.overlong=penalty` adds to each rollout's reward, from -1 to 0."""
        return [self.overlong.penalty(len(rollout.tokens)) for rollout in self.rollouts]

    @property
    def shaped_rewards_KG(self) -> torch.Tensor:
        """Rewards from which advantages are computed: penalties are added."""
        if self.overlong.method != "penalty":
            return self.rewards_KG
        return self.rewards_KG + torch.tensor(self.penalties).view(len(self.chosen), -1)

    @property
    def masked(self) -> list[bool]:
        """Whether each rollout is removed from the update (`rollout.overlong=mask`)."""
        if self.overlong.method != "mask":
            return [False] * len(self.rollouts)
        return [self.overlong.masks(rollout.finished) for rollout in self.rollouts]

    @property
    def prompts(self) -> list[Prompt]:
        """Prompt of each group."""
        return [rollout.prompt for rollout in self.rollouts[:: self.rewards_KG.shape[1]]]

    def extend(
        self, chosen: Sequence[int], rollouts: Sequence[Rollout], grades: Sequence[Grade]
    ) -> "Groups":
        """Return these groups followed by others."""
        return replace(
            self,
            chosen=(*self.chosen, *chosen),
            rollouts=(*self.rollouts, *rollouts),
            grades=(*self.grades, *grades),
        )

    def select_for_training(self, num_groups: int) -> "Groups":
        """Return the first `num_groups` with an advantage; others fill up where there are too few.

        Those add nothing to the gradient, unless `advantage.method` is one that gives them an
        advantage, but the batch and so the loss's normaliser stay as large.
        """
        rewards_KG = self.shaped_rewards_KG
        all_masked_K = torch.tensor(self.masked).view(rewards_KG.shape).all(dim=1)
        useless_K, group_size = zero_variance(rewards_KG) | all_masked_K, rewards_KG.shape[1]
        kept = sorted(useless_K.int().argsort(stable=True)[:num_groups].tolist())
        members = [k * group_size + g for k in kept for g in range(group_size)]
        return replace(
            self,
            chosen=tuple(self.chosen[k] for k in kept),
            rollouts=tuple(self.rollouts[i] for i in members),
            grades=tuple(self.grades[i] for i in members),
        )

    def mini_batches(self, count: int) -> list[list[int]]:
        """Return the rollouts of each optimizer update, as positions in `rollouts`.

        Without those that are masked; a mini-batch of which nothing is left is no update.
        """
        num_groups, group_size = self.rewards_KG.shape
        masked = self.masked
        unmasked = (
            [i for i in index if not masked[i]]
            for index in mini_batches(num_groups, group_size, count)
        )
        return [index for index in unmasked if index]


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
