"""Treatment of completions that are cut off, or nearly so (`rollout.overlong`).

`mask`: overlong filtering (DAPO, arXiv 2503.14476, section 3.4).  Only the loss is masked: rewards
and advantages of a group are computed from all of its rollouts, and then those that did not finish
are removed from the update, including its normaliser and the mean entropy of its weights.

`penalty`: the soft punishment of `prepo/overlong.py` is added to the rewards from which advantages
are computed.  Pass rates, selectors and the ledger see the reward function's own rewards.

An aborted completion (`servers.straggler_seconds`) is cut off as well, so it is masked.  A penalty
depends on length alone: a slow server costs no reward.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_prepo.config import RolloutConfig
from megatron_prepo.prepo.overlong import soft_penalty


@dataclass(frozen=True)
class Overlong:
    """The configured treatment."""

    method: Literal["keep", "mask", "penalty"] = "keep"
    max_tokens: int = 0
    """Limit of new tokens."""
    buffer: int = 0
    """Tokens before the limit over which the penalty grows from 0 to 1."""

    @classmethod
    def of(cls, settings: RolloutConfig) -> "Overlong":
        """Return the treatment that the settings name."""
        return cls(settings.overlong, settings.max_new_tokens, settings.penalty_buffer)

    def masks(self, finished: bool) -> bool:
        """Return whether a completion is removed from the update."""
        return self.method == "mask" and not finished

    def penalty(self, length: int) -> float:
        """Return what is added to the reward of a completion of `length` tokens, from -1 to 0."""
        if self.method != "penalty":
            return 0.0
        return soft_penalty(length, max_tokens=self.max_tokens, buffer=self.buffer)


KEEP = Overlong()
"""Completions that are cut off are trained on like any other."""
