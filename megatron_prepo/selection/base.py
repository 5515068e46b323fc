"""The interface of a method of prompt selection, and the input of its choice."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_prepo.config import SelectionConfig
from megatron_prepo.records import Prompt


@dataclass(frozen=True)
class Candidates:
    """P candidate prompts of a step; scores that the selector does not need are None."""

    prompts: Sequence[Prompt]
    ppl_P: torch.Tensor | None = None
    """Prompt perplexity under the current policy, float64, from `selection.ppl_from`."""
    entropy_P: torch.Tensor | None = None
    """Mean full-vocabulary entropy over the prompt's tokens in nats, float64."""
    pass_rate_P: torch.Tensor | None = None
    """Share of probe rollouts that pass, float64 (oracle only)."""
    actor_ppl_P: torch.Tensor | None = None
    """Perplexity under the actor, in steps where `ppl_P` is the engine's and both are compared."""
    hidden_PD: torch.Tensor | None = None
    """D features of the actor's last hidden states, float64: the mean of those that predict the
    prompt's tokens, projected; None with `selection.ppl_from=engine`."""

    def at(self, positions: Sequence[int]) -> list[Prompt]:
        """Return the prompts at these positions."""
        return [self.prompts[i] for i in positions]


class Selector(Protocol):
    """Chooses which candidates are rolled out; inherit it, and write what differs from the default.

    All its answers are the same on every rank: what is random follows from seed, step and
    observations.
    """

    needs_scores: bool = False
    """Whether `ppl_P` and `entropy_P` of the candidates are to be computed."""
    hidden_features: int = 0
    """D, with `needs_scores`: how many features of the hidden states are to be computed."""
    needs_pass_rates: bool = False
    """Whether all candidates are to be rolled out for their `pass_rate_P`."""
    refills: bool = False
    """Whether to ask again within the step, after `observe`, until nothing is chosen; the step then
    trains on the first K groups with an advantage."""

    shares_budget: bool = False
    """Whether the K*G rollouts of a step are shared among prompts by `group_sizes`; a later round
    may then choose a prompt again, which extends its group."""
    needs_updates: bool = False
    """Whether `observe_update` is to be called after each step's updates; not possible with
    `train.overlap`, which chooses before them."""

    @abstractmethod
    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        """A completion passes from the reward `pass_reward` on."""

    @abstractmethod
    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return positions of the candidates to roll out; different ones each time in a step.

        With `shares_budget`, a later round may return those of an earlier one.
        """

    def group_sizes(self, prompts: Sequence[Prompt], group_size: int) -> list[int]:
        """Return the number of rollouts of each prompt just chosen; by default `group_size`, G."""
        return [group_size] * len(prompts)

    def observe(self, prompts: Sequence[Prompt], rewards_KG: torch.Tensor) -> None:
        """Learn from the rewards of what was chosen; by default nothing.

        They are a tuple of K tensors if `group_sizes` has returned numbers that differ.
        """
        return

    def observe_update(self, size: float) -> None:
        """Learn how far the step's updates moved the policy; by default nothing.

        `size` is the learning rate times the norm of the clipped gradient, 0 without an update.
        """
        return

    def metrics(self) -> dict[str, float]:
        """Return what to log of the step, as `selection/NAME`; by default nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what has to be saved between two steps, plain JSON; by default nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state with a new step; by default nothing is restored."""
        return
