"""Verifiable rewards: pure functions from a completion's text and the answer to a number."""

import math
from collections.abc import Callable, Sequence

from megatron_prepo.records import Rollout
from megatron_prepo.rewards.final_number import final_number

FUNCTIONS: dict[str, Callable[[str, str], float]] = {"final_number": final_number}


def grade(
    rollouts: Sequence[Rollout],
    function: Callable[[str, str], float],
    *,
    low: float = 0.0,
    high: float = 1.0,
) -> list[float]:
    """The reward of each rollout; a completion cut at the length limit is graded as it stands.

    Raises ValueError naming the prompt for a reward that is not finite or out of [low, high].
    """
    rewards_N = []
    for rollout in rollouts:
        reward = float(function(rollout.text, rollout.prompt.answer))
        if not (math.isfinite(reward) and low <= reward <= high):
            raise ValueError(
                f"prompt {rollout.prompt.id!r}: reward {reward} of {rollout.text[:80]!r} is not "
                f"within reward.low={low} and reward.high={high}"
            )
        rewards_N.append(reward)
    return rewards_N
