"""avg@k and unbiased pass@k of a suite of problems, with intervals.

n samples of a problem, c of which pass: avg@n is c / n, and pass@k, the chance that one of k
samples passes, is ``1 - C(n - c, k) / C(n, k)`` without bias (Chen et al., arXiv 2107.03374).

Intervals are Wilson's, which stay within 0 and 1 and have a width even if all or none passed.  The
samples of a problem are dependent, so their number is replaced by an effective sample size: that of
independent samples whose mean has the variance observed between the problems' means, as in cluster
surveys (Korn and Graubard 1998; Dean and Pagano 2015, doi 10.1093/jssam/smv024).  Means over suites
and differences combine the lower and the upper limits separately (MOVER; Zou and Donner 2008,
Newcombe 1998).

Letters: P problems.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Return the probability that k samples drawn without replacement include one that passed.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 1, 4), pass_at_k(4, 0, 4)
    (0.25, 0.5, 1.0, 0.0)
    """
    assert 1 <= k <= num_samples and 0 <= num_passed <= num_samples
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def powers_of_two(most: int) -> list[int]:
    """Return the k of pass@k: 1, 2, 4, ... below the number of samples, and that number.

    >>> powers_of_two(12)
    [1, 2, 4, 8, 12]
    """
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def mean_with_ci95(suites: Sequence[Sequence[float]], samples: int) -> dict[str, Any]:
    """Return the mean over suites of their means, and its 95 % interval, as `mean` and `ci95`.

    `suites` has one value per problem, within 0 and 1, of up to `samples` independent draws.
    """
    means = np.array([np.mean(values_P) for values_P in suites])
    limits = np.array([ci95(values_P, samples) for values_P in suites])
    low, high = (math.hypot(*(means - limits[:, side])) / len(means) for side in (0, 1))
    mean = float(means.mean())
    return {"mean": mean, "ci95": list(_within(mean - low, mean + high, 0.0))}


def ci95(values_P: Sequence[float] | np.ndarray, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean over problems of this kind; see `mean_with_ci95`.

    The effective sample size lies between P, if all samples of a problem agree, and P times
    `samples`, if problems do not differ.  With several samples per problem it is estimated from P
    problems, hence Student's t in place of the normal quantile.

    >>> [[round(limit, 3) for limit in ci95([value] * 20, samples=4)] for value in (0.0, 1.0)]
    [[0.0, 0.18], [0.82, 1.0]]
    """
    x_P: NDArray[np.float64] = np.asarray(values_P, dtype=np.float64)
    num, mean = len(x_P), float(x_P.mean())
    several = num > 1 and samples > 1
    z = float(stats.t.ppf(0.975, num - 1) if several else stats.norm.ppf(0.975))
    spread, variance = mean * (1 - mean), x_P.var(ddof=1) / num if num > 1 else 0.0
    size: float = num
    if several and spread > 0:
        size = min(max(num, spread / variance if variance > 0 else math.inf), num * samples)
    return wilson(mean, size, z)


def wilson(mean: float, size: float, z: float) -> tuple[float, float]:
    """Return Wilson's interval (1927) of a proportion observed in `size` independent samples.

    It holds all p for which the proportion is within z standard deviations sqrt(p (1 - p) / size).
    """
    center = (mean + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z * math.sqrt(mean * (1 - mean) / size + (z / (2 * size)) ** 2) / (1 + z**2 / size)
    # at 0 and 1 the limit is the proportion itself, which rounding must not exclude
    return _within(min(mean, center - half), max(mean, center + half), 0.0)


def difference_ci95(
    before_P: Sequence[float], after_P: Sequence[float], samples: tuple[int, int]
) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `after_P - before_P`, paired by problem.

    Newcombe's interval for paired proportions (1998, method 10): the correlation of the two
    proportions is that of the problems' values, less his continuity correction, so that two equal
    evaluations do not prove a difference of exactly 0.  `samples` has the number of samples per
    problem, before and after.
    """
    x_P: NDArray[np.float64] = np.asarray(before_P, dtype=np.float64)
    y_P: NDArray[np.float64] = np.asarray(after_P, dtype=np.float64)
    covariance = float(np.mean((x_P - x_P.mean()) * (y_P - y_P.mean())))
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * len(x_P)))
    scale = float(x_P.std() * y_P.std())
    correlation = covariance / scale if covariance else 0.0
    (low_x, high_x), (low_y, high_y) = ci95(x_P, samples[0]), ci95(y_P, samples[1])
    x, y = float(x_P.mean()), float(y_P.mean())

    def distance(of_y: float, of_x: float) -> float:
        return math.sqrt(max(0.0, of_y**2 - 2 * correlation * of_y * of_x + of_x**2))

    return _within(
        y - x - distance(y - low_y, high_x - x), y - x + distance(high_y - y, x - low_x), -1.0
    )


def _within(low: float, high: float, least: float) -> tuple[float, float]:
    """Clip limits that rounding moved outside `least` to 1."""
    return max(least, low), min(1.0, high)
