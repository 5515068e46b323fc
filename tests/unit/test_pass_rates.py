"""pass@k against every draw of k samples there is, and intervals against what they promise."""

import itertools
import math

import numpy as np
import pytest
from rounding import approx

from megatron_prepo.pass_rates import mean_with_ci95, pass_at_k, powers_of_two


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_draws_with_a_sample_that_passed(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [True] * c + [False] * (n - c)
        draws = [any(draw) for draw in itertools.combinations(samples, k)]
        assert pass_at_k(n, c, k) == approx(sum(draws) / len(draws))


def test_pass_at_k_is_unbiased():
    """Over all outcomes of n samples that pass with probability p, its mean is 1 - (1 - p)^k."""
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


def test_the_interval_of_many_problems_is_the_normal_one():
    values_P = np.random.default_rng(1).random(400)
    result, mean = mean_with_ci95([values_P]), values_P.mean()
    half = 1.96 * values_P.std() / 20
    assert result["mean"] == approx(mean)
    assert result["ci95"] == pytest.approx([mean - half, mean + half], abs=0.05 * half)


def test_the_mean_over_suites_counts_each_suite_once():
    """A suite without variance only halves the other's interval."""
    values_P = [0.0, 0.25, 1.0, 0.5]
    alone, both = mean_with_ci95([values_P]), mean_with_ci95([values_P, [1.0] * 30])
    assert both["mean"] == approx((alone["mean"] + 1) / 2)
    width = np.diff(alone["ci95"]), np.diff(both["ci95"])
    assert width[1] == pytest.approx(width[0] / 2, rel=0.05)
    assert mean_with_ci95([[1.0, 1.0]]) == {"mean": 1.0, "ci95": [1.0, 1.0]}


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Suites of 30 problems, as AIME has; a bootstrap of few falls a little short of 95 %."""
    random, covered = np.random.default_rng(2), 0
    for _ in range(60):
        passed_P = random.binomial(16, random.beta(0.5, 1.0, size=30)) / 16
        low, high = mean_with_ci95([passed_P])["ci95"]
        covered += low <= 1 / 3 <= high
    assert covered / 60 >= 0.85
