"""PREPO's schedule: a window over the candidates sorted by perplexity (arXiv 2511.00794, sec. 3.1).

    l(rho) = floor(rho (|B| - K));  selected: sigma(l), ..., sigma(l + K - 1)

sigma sorts by perplexity, ascending.  Progress rho = step / (horizon - 1) is 0 in the first step
and 1 in the last; `rho_max` scales it, so that the window may stop before the hardest prompts.

Not in the paper: other pacings f(rho) with f(0) = 0 and f(1) = 1, and the direction from high to
low.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import torch


def linear(rho: Fraction) -> Fraction:
    """Return rho itself, as published."""
    return rho


def quadratic(rho: Fraction) -> Fraction:
    """Return the square of rho, which stays on the easy prompts longer."""
    return rho * rho


def root(rho: Fraction) -> float:
    """Return the root of rho, which leaves the easy prompts sooner."""
    return math.sqrt(rho)


PACINGS: dict[str, Callable[[Fraction], Fraction | float]] = {
    "linear": linear,
    "quadratic": quadratic,
    "root": root,
}


def progress(step: int, horizon: int, rho_max: float = 1.0) -> Fraction:
    """Return rho of a step, counted from 0: 0 in the first, `rho_max` from step ``horizon - 1`` on.

    A fraction, because floor(rho (|B| - K)) of a rounded rho can be one too small.
    """
    reached = Fraction(min(step, horizon - 1), horizon - 1) if horizon > 1 else Fraction(0)
    return reached * Fraction(rho_max).limit_denominator(10**6)


def window_start(rho: Fraction | float, num_candidates: int, num_selected: int) -> int:
    """Return l(rho) = floor(rho (|B| - K)), from 0 to |B| - K.

    >>> [window_start(Fraction(i, 4), 10, 2) for i in range(5)]
    [0, 2, 4, 6, 8]
    """
    return int(rho * (num_candidates - num_selected))


def select_window(ppl_P: torch.Tensor, first: int, num_selected: int) -> list[int]:
    """Return the candidates at positions first, ..., first + K - 1 of the ascending order.

    Ties keep their order; non-finite perplexities come last.

    >>> select_window(torch.tensor([3.0, float("nan"), 1.0, 2.0]), 1, 2)
    [3, 0]
    """
    finite_first_P = torch.nan_to_num(ppl_P, nan=torch.inf, posinf=torch.inf)
    order: list[int] = torch.argsort(finite_first_P, stable=True).tolist()
    return order[first : first + num_selected]
