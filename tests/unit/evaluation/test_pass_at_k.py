"""Estimates of pass@k against every possible draw of k samples, and the coverage of intervals."""

import itertools
import math

import numpy as np
import pytest
from rounding import approx
from scipy import stats

from megatron_prepo.evaluation.pass_at_k import (
    ci95,
    difference_ci95,
    mean_with_ci95,
    pass_at_k,
    powers_of_two,
    wilson,
)


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_draws_with_a_sample_that_passed(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [True] * c + [False] * (n - c)
        draws = [any(draw) for draw in itertools.combinations(samples, k)]
        assert pass_at_k(n, c, k) == approx(sum(draws) / len(draws))


def test_pass_at_k_is_unbiased():
    """The mean over all outcomes of n samples that pass with probability p is 1 - (1 - p)^k."""
    n, p = 6, 0.3
    for k in range(1, n + 1):
        mean = sum(
            math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1)
        )
        assert mean == approx(1 - (1 - p) ** k)


def test_it_is_exact_where_factorials_overflow_a_float():
    assert pass_at_k(2000, 1, 1000) == approx(0.5, operations=3 * 1000)  # 1000 quotients
    assert pass_at_k(2000, 1001, 1000) == 1.0


def test_k_asked_for():
    assert powers_of_two(1) == [1] and powers_of_two(16) == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("num", [1, 2, 7, 40, 1000])
def test_one_sample_of_each_problem_is_scipys_wilson_interval(num):
    for passed in {0, 1, num // 2, num - 1, num}:
        expected = stats.binomtest(passed, num).proportion_ci(0.95, "wilson")
        found = ci95([1.0] * passed + [0.0] * (num - passed), samples=1)
        assert found == approx((expected.low, expected.high), scale=1.0)


def test_the_interval_of_many_problems_is_the_normal_one():
    """Wilson's interval of 10,000 problems differs from the normal one by terms of 1 / P."""
    values_P = np.random.default_rng(1).binomial(8, 0.7 * np.random.default_rng(2).random(10_000))
    result, mean = mean_with_ci95([values_P / 8], 8), values_P.mean() / 8
    half = 1.96 * values_P.std() / 8 / 100
    assert result["mean"] == pytest.approx(mean)
    assert result["ci95"] == pytest.approx([mean - half, mean + half], abs=0.01 * half)


def test_problems_and_not_samples_are_counted_where_samples_are_alike():
    """All samples of a problem pass or none: as wide as one sample's, except for Student's t."""
    passed_P = [1.0] * 30 + [0.0] * 70
    low, high = ci95(passed_P, samples=8)
    t = stats.t.ppf(0.975, 99)
    assert (low, high) == wilson(0.3, 100, t)
    alike = ci95([0.25, 0.75] * 50, samples=4)
    assert alike[1] - alike[0] < 0.6 * (high - low), "where they differ less, they count for more"


def test_every_interval_is_within_its_range_holds_its_mean_and_has_a_width():
    """Every multiset of up to 4 problems of up to 4 samples, for one suite, two, and a gain."""
    for samples, num in itertools.product((1, 2, 4), (1, 2, 3, 4)):
        shares = [passed / samples for passed in range(samples + 1)]
        draws = list(itertools.combinations_with_replacement(shares, num))
        for values_P, others_P in itertools.product(draws, draws[:: max(1, len(draws) // 9)]):
            for suites in ([values_P], [values_P, others_P]):
                result = mean_with_ci95(suites, samples)
                low, high = result["ci95"]
                assert 0 <= low <= result["mean"] <= high <= 1 and high - low > 0.01
            low, high = difference_ci95(values_P, others_P, (samples, samples))
            gain = np.mean(others_P) - np.mean(values_P)
            assert -1 <= low <= gain + 1e-15 and gain - 1e-15 <= high <= 1 and high - low > 0.01


def test_the_mean_over_suites_counts_each_suite_once():
    """Limits are as far away as the hypotenuse of the suites' own, divided by their number."""
    values_P = [0.0, 0.25, 1.0, 0.5]
    alone, other = (mean_with_ci95([suite], 4) for suite in (values_P, [1.0] * 30))
    both = mean_with_ci95([values_P, [1.0] * 30], 4)
    assert both["mean"] == pytest.approx((alone["mean"] + 1) / 2)
    for side in (0, 1):
        far = [one["mean"] - one["ci95"][side] for one in (alone, other, both)]
        assert abs(far[2]) == pytest.approx(math.hypot(*far[:2]) / 2)


def newcombe(a: int, b: int, c: int, d: int) -> tuple[float, float]:
    """Compute method 10 of Newcombe (1998) from the table of pairs: a both, b first, c second only.

    The interval is that of the second share less the first.
    """
    n = a + b + c + d
    first, second = (
        (share, *stats.binomtest(share, n).proportion_ci(0.95, "wilson"))
        for share in (a + b, a + c)
    )
    (x, low_x, high_x), (y, low_y, high_y) = first, second
    x, y, phi = x / n, y / n, a * d - b * c
    if phi > 0:
        phi = max(0, phi - n / 2)
    if phi:
        phi /= math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    below, above = (
        math.sqrt(one**2 - 2 * phi * one * other + other**2)
        for one, other in ((y - low_y, high_x - x), (high_y - y, x - low_x))
    )
    return y - x - below, y - x + above


@pytest.mark.parametrize("table", [(20, 3, 9, 8), (0, 5, 7, 0), (10, 0, 0, 30), (0, 0, 0, 12)])
def test_the_gain_of_one_sample_of_each_problem_is_newcombes(table):
    a, b, c, d = table
    before_P, after_P = [1] * (a + b) + [0] * (c + d), [1] * a + [0] * b + [1] * c + [0] * d
    assert difference_ci95(before_P, after_P, (1, 1)) == approx(newcombe(*table), scale=1.0)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Suites of 30 problems, as AIME has, and few; the problems' own rates are skewed to 0."""
    random, tries = np.random.default_rng(2), 400
    for num, samples in ((30, 16), (30, 1), (5, 16)):
        covered = gains = 0
        for _ in range(tries):
            rates_P = random.beta(0.5, 1.0, size=num)
            before_P, after_P = random.binomial(samples, [rates_P, (rates_P + 0.2) / 1.2]) / samples
            low, high = ci95(before_P, samples)
            covered += low <= 1 / 3 <= high
            low, high = difference_ci95(before_P, after_P, (samples, samples))
            gains += low <= (1 / 3 + 0.2) / 1.2 - 1 / 3 <= high
        # 400 tries at 95 % give less than 0.92 once in 200
        assert covered / tries >= 0.92 and gains / tries >= 0.92, (num, samples)
