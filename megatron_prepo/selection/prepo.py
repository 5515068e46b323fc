"""PREPO's schedule: a window over the candidates sorted by perplexity (arXiv 2511.00794, sec. 3.1).

    l(rho) = floor(rho (|B| - K));  selected: sigma(l), ..., sigma(l + K - 1)

sigma sorts by perplexity, ascending.  Progress rho = step / (horizon - 1) is 0 in the first step
and 1 in the last; `rho_max` scales it, so that the window may stop before the hardest prompts.
"""

from fractions import Fraction

import torch

from megatron_prepo.config import SelectionConfig


class PerplexityWindow:
    """The linear window, as published."""

    needs_perplexity = True

    def __init__(self, config: SelectionConfig, *, total_steps: int, seed: int):
        self.num_selected = config.num_selected
        self.rho_max = config.rho_max
        self.horizon = config.horizon or total_steps

    def choose(self, ppl_P: torch.Tensor, step: int) -> tuple[list[int], int]:
        """Indices of the K selected candidates, easiest first, and the window's first position."""
        first = window_start(
            progress(step, self.horizon, self.rho_max), len(ppl_P), self.num_selected
        )
        return select_window(ppl_P, first, self.num_selected), first

    def observe(self, prompts, rewards_KG) -> None:
        """The schedule learns nothing from rewards."""

    def state_dict(self) -> dict:
        """Nothing: the window follows from the step."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""


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
