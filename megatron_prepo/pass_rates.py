"""avg@k and unbiased pass@k of a suite of problems, with intervals.

n samples of a problem, c of which pass: avg@n is c / n, and pass@k, the chance that one of k
samples passes, is ``1 - C(n - c, k) / C(n, k)`` without bias (Chen et al., arXiv 2107.03374).  The
problem is the unit that is drawn again for an interval: its samples depend on each other.

Letters: P problems.
"""

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


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


def mean_with_ci95(suites: Sequence[Sequence[float]]) -> dict:
    """The mean over suites of their means, and its 95 % interval, from one value a problem.

    A percentile bootstrap: the problems of each suite are drawn again, 10,000 times, always by the
    same random numbers.  One suite is simply its own mean.
    """
    random = np.random.default_rng(0)
    values = [np.asarray(values_P, dtype=float) for values_P in suites]
    drawn = np.mean([_resampled_means(random, values_P) for values_P in values], axis=0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    mean = np.mean([values_P.mean() for values_P in values])
    return {"mean": float(mean), "ci95": [float(low), float(high)]}


def _resampled_means(random: np.random.Generator, values_P: np.ndarray) -> np.ndarray:
    num, at_once = len(values_P), RESAMPLES // 10
    draws = [values_P[random.integers(num, size=(at_once, num))].mean(axis=1) for _ in range(10)]
    return np.concatenate(draws)
