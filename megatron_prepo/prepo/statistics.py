"""Statistics of tokens and rollouts for the metrics of a step."""

import math

import torch


def quantiles(name: str, values: torch.Tensor) -> dict[str, float]:
    """Return minimum, quartiles and maximum as metrics `NAME/min`, `NAME/q25` and so on."""
    values, points = values.double(), {"q25": 0.25, "q50": 0.5, "q75": 0.75}
    return {
        f"{name}/min": float(values.min()),
        **{f"{name}/{label}": float(torch.quantile(values, q)) for label, q in points.items()},
        f"{name}/max": float(values.max()),
    }


def effective_share(log_ratio_N: torch.Tensor) -> float:
    """Return Kish's effective sample size per sample: (sum r)^2 / (N sum r^2).

    >>> effective_share(torch.tensor([0.0, 0.0, -math.inf, -math.inf]))
    0.5
    """
    ratio_N = (log_ratio_N.double() - log_ratio_N.max()).exp()
    return float(ratio_N.sum() ** 2 / (len(ratio_N) * (ratio_N**2).sum()))


def nearest_rank(values_T: torch.Tensor, q: float) -> float:
    """Return the nearest-rank quantile; `torch.quantile` limits the number of values."""
    return float(values_T.kthvalue(max(1, math.ceil(q * len(values_T)))).values)
