"""PREPO's schedule: a window over the candidates sorted by perplexity (arXiv 2511.00794, sec. 3.1).

    l(rho) = floor(rho (|B| - K));  selected: sigma(l), ..., sigma(l + K - 1)

sigma sorts by perplexity, ascending.  Progress rho = step / (horizon - 1) is 0 in the first step
and 1 in the last; `rho_max` scales it, so that the window may stop before the hardest prompts.

What the paper leaves for others to try: another pacing f(rho) with f(0) = 0 and f(1) = 1, and the
way from high to low.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import torch

from megatron_prepo.config import SelectionConfig
from megatron_prepo.selection.base import Candidates, Selector


def linear(rho: Fraction) -> Fraction:
    """As published."""
    return rho


def quadratic(rho: Fraction) -> Fraction:
    """Stays on the easy prompts longer."""
    return rho * rho


def root(rho: Fraction) -> float:
    """Leaves the easy prompts sooner."""
    return math.sqrt(rho)


PACINGS: dict[str, Callable[[Fraction], Fraction | float]] = {
    "linear": linear,
    "quadratic": quadratic,
    "root": root,
}


class PerplexityWindow(Selector):
    """A window of K candidates that slides from low to high perplexity."""

    needs_scores = True

    def __init__(self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float):
        self.num_selected = config.num_selected
        self.rho_max = config.rho_max
        self.horizon = config.horizon or total_steps
        self.pacing = PACINGS[config.pacing]
        self.descends = config.direction == "high-to-low"
        self.first = 0

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Positions of the K selected candidates, lowest perplexity first."""
        room = len(candidates.prompts) - self.num_selected
        rho = progress(step, self.horizon, self.rho_max)
        self.first = window_start(self.pacing(rho), len(candidates.prompts), self.num_selected)
        if self.descends:
            self.first = room - self.first
        return select_window(candidates.ppl_P, self.first, self.num_selected)

    def metrics(self) -> dict[str, float]:
        """The window's ends, as positions in the ascending order."""
        return {
            "selection/window_first": self.first,
            "selection/window_last": self.first + self.num_selected - 1,
        }


def progress(step: int, horizon: int, rho_max: float = 1.0) -> Fraction:
    """rho of a step, counted from 0; 0 in the first, `rho_max` from step ``horizon - 1`` on.

    A fraction, because floor(rho (|B| - K)) of a rounded rho can be one too small.
    """
    reached = Fraction(min(step, horizon - 1), horizon - 1) if horizon > 1 else Fraction(0)
    return reached * Fraction(rho_max).limit_denominator(10**6)


def window_start(rho: Fraction | float, num_candidates: int, num_selected: int) -> int:
    """l(rho) = floor(rho (|B| - K)), from 0 to |B| - K.

    >>> [window_start(Fraction(i, 4), 10, 2) for i in range(5)]
    [0, 2, 4, 6, 8]
    """
    return int(rho * (num_candidates - num_selected))


def select_window(ppl_P: torch.Tensor, first: int, num_selected: int) -> list[int]:
    """Indices of the candidates at positions first, ..., first + K - 1 of the ascending order.

    Ties keep their order; perplexities that are not finite come last.

    >>> select_window(torch.tensor([3.0, float("nan"), 1.0, 2.0]), 1, 2)
    [3, 0]
    """
    order_P = torch.argsort(
        torch.nan_to_num(ppl_P, nan=torch.inf, posinf=torch.inf), stable=True
    ).tolist()
    return order_P[first : first + num_selected]
