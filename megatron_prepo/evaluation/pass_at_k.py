"""avg@k and unbiased pass@k of a suite of problems, with intervals.

n samples of a problem, c of which pass: avg@n is c / n, and pass@k, the chance that one of k
samples passes, is ``1 - C(n - c, k) / C(n, k)`` without bias (Chen et al., arXiv 2107.03374).

Intervals are Wilson's, which stay within 0 and 1 and have a width where all or none passed.  The
samples of a problem depend on each other, so their number is replaced by the effective one: that of
independent samples whose mean would have the variance that the problems' means show, as in surveys
of clusters (Korn and Graubard 1998; Dean and Pagano 2015, doi 10.1093/jssam/smv024).  Means over
suites and differences take the limits apart (MOVER; Zou and Donner 2008, Newcombe 1998).

Letters: P problems.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The chance that a draw of k of the samples, without putting back, has one that passed.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 1, 4), pass_at_k(4, 0, 4)
    (0.25, 0.5, 1.0, 0.0)
    """
    assert 1 <= k <= num_samples and 0 <= num_passed <= num_samples
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def powers_of_two(most: int) -> list[int]:
    """The k of pass@k: 1, 2, 4, ... and the number of samples itself.

    >>> powers_of_two(12)
    [1, 2, 4, 8, 12]
    """
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def mean_with_ci95(suites: Sequence[Sequence[float]], samples: int) -> dict:
    """Return the mean over suites of their means, and its 95 % interval, as `mean` and `ci95`.

    `suites` has one value per problem, within 0 and 1, of up to `samples` independent draws.
    """
    means = np.array([np.mean(values_P) for values_P in suites])
    limits = np.array([ci95(values_P, samples) for values_P in suites])
    low, high = (math.hypot(*(means - limits[:, side])) / len(means) for side in (0, 1))
    mean = float(means.mean())
    return {"mean": mean, "ci95": list(_within(mean - low, mean + high, 0.0))}


def ci95(values_P: Sequence[float], samples: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean over problems of this kind; see `mean_with_ci95`.

    The effective number of samples lies between P, where the samples of a problem are all alike,
    and P times `samples`, where the problems are.  With several samples its estimate is as good as
    P problems allow, hence Student's t in place of the normal quantile.

    >>> [[round(limit, 3) for limit in ci95([value] * 20, samples=4)] for value in (0.0, 1.0)]
    [[0.0, 0.18], [0.82, 1.0]]
    """
    values_P = np.asarray(values_P, dtype=float)
    num, mean = len(values_P), float(values_P.mean())
    several = num > 1 and samples > 1
    z = float(stats.t.ppf(0.975, num - 1) if several else stats.norm.ppf(0.975))
    spread, variance = mean * (1 - mean), values_P.var(ddof=1) / num if num > 1 else 0.0
    size = num
    if several and spread > 0:
        size = min(max(num, spread / variance if variance > 0 else math.inf), num * samples)
    return wilson(mean, size, z)


def wilson(mean: float, size: float, z: float) -> tuple[float, float]:
    """Return Wilson's interval (1927) of a share found in `size` independent samples.

    All p for which the share is within z standard deviations sqrt(p (1 - p) / size).
    """
    center = (mean + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z * math.sqrt(mean * (1 - mean) / size + (z / (2 * size)) ** 2) / (1 + z**2 / size)
    # at 0 and 1 the limit is the share itself, which rounding must not put outside
    return _within(min(mean, center - half), max(mean, center + half), 0.0)


def difference_ci95(
    before_P: Sequence[float], after_P: Sequence[float], samples: tuple[int, int]
) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `after_P - before_P`, the same problems twice.

    Newcombe's for paired proportions (1998, method 10): the correlation of the two shares is that
    of the problems' values, less his correction for continuity, so that two equal evaluations are
    no proof of a difference of exactly 0.  `samples` of each value, before and after.
    """
    x_P, y_P = (np.asarray(values, dtype=float) for values in (before_P, after_P))
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
    """Without what rounding puts outside of `least` to 1."""
    return max(least, low), min(1.0, high)
