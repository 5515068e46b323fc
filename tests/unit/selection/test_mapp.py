"""MaPP: the probability of an advantage in closed form, and the draw in proportion to it."""

from collections import Counter
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from rounding import approx
from scipy import stats

from megatron_prepo.selection.base import Candidates
from megatron_prepo.selection.mapp import informative
from tests.unit.selection.selectors import passes, prompts, selector


def rising(a: Fraction, n: int) -> Fraction:
    """Return a (a + 1) ... (a + n - 1)."""
    product = Fraction(1)
    for i in range(n):
        product *= a + i
    return product


def exact(alpha: Fraction, beta: Fraction, group_size: int) -> Fraction:
    """Sum the beta-binomial probabilities of 1 to G - 1 passes, in fractions."""
    return sum(
        comb(group_size, s) * rising(alpha, s) * rising(beta, group_size - s)
        for s in range(1, group_size)
    ) / rising(alpha + beta, group_size)


@pytest.mark.parametrize("group_size", [2, 5, 8, 64])
@pytest.mark.parametrize(
    ("alpha", "beta"),
    [(1, 1), (5, 1), (1, 9), (2.5, 6.5), (100, 1), (1, 4001), (10**6, 1.5), (0.25, 0.25)],
)
def test_the_closed_form_is_the_sum_over_all_other_counts(alpha, beta, group_size):
    """Compare with exact fractions; also where all but every millionth group passes."""
    expected = float(exact(Fraction(alpha), Fraction(beta), group_size))
    (found,) = informative(np.array([alpha]), np.array([beta]), group_size)
    assert found == approx(expected, scale=expected + 1 / group_size)


def test_the_probability_is_that_of_simulated_groups():
    """200,000 groups: within four standard errors, at most 0.0045."""
    rng = np.random.default_rng(0)
    passed = rng.binomial(8, rng.beta(2.5, 6.5, size=200_000))
    share = ((passed > 0) & (passed < 8)).mean()
    (found,) = informative(np.array([2.5]), np.array([6.5]), 8)
    assert abs(share - found) < 4 * (found * (1 - found) / 200_000) ** 0.5


def test_symmetric_and_largest_in_the_middle():
    alpha = np.arange(1.0, 20)
    found = informative(alpha, 20 - alpha, 8)
    assert found == approx(found[::-1]) and found.argmax() == 9
    assert (np.diff(found[:10]) > 0).all()


def test_uncertainty_lowers_the_score_where_the_mean_is_the_same():
    """V is concave: a wide posterior around 1/2 is worth less than a narrow one."""
    narrow, wide = informative(np.array([50.0, 1.0]), np.array([50.0, 1.0]), 8)
    assert wide < narrow < 1 - 2 * 0.5**8


def test_the_posterior_is_that_of_mopps():
    """4, 1 and 0 right of 4 with lambda 1/2, as in `test_mopps.py`."""
    chooser = selector("mapp")
    for right in (4, 1, 0):
        chooser.observe(prompts(1), passes(right))
    assert chooser.beta("p0") == (2.5, 6.5)


def test_draws_are_in_proportion_to_the_probability():
    """K = 1 of 4, 4000 seeded steps: a chi-squared test with a p-value above 0.001."""
    chooser, pool = selector("mapp", candidates=4, selected=1), Candidates(prompts(4))
    chooser.posterior = {"p0": (50.0, 1.0), "p1": (9.0, 1.0), "p2": (3.0, 2.0)}
    chooser.group_size = 4
    counts = Counter(chooser.choose(pool, step)[0] for step in range(4000))
    weight = informative(np.array([50.0, 9, 3, 1]), np.array([1.0, 1, 2, 1]), 4)
    expected = 4000 * weight / weight.sum()
    assert stats.chisquare([counts[i] for i in range(4)], expected).pvalue > 0.001


def test_a_second_prompt_is_drawn_from_the_rest():
    """K = 2 of 3: the probability of each ordered pair is w_i w_j / (1 - w_i), at unit sum."""
    chooser, pool = selector("mapp", candidates=3, selected=2), Candidates(prompts(3))
    chooser.posterior, chooser.group_size = {"p0": (9.0, 1.0), "p1": (3.0, 2.0)}, 4
    counts = Counter(tuple(chooser.choose(pool, step)) for step in range(6000))
    weight = informative(np.array([9.0, 3, 1]), np.array([1.0, 2, 1]), 4)
    weight = weight / weight.sum()
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    expected = [6000 * weight[i] * weight[j] / (1 - weight[i]) for i, j in pairs]
    assert stats.chisquare([counts[pair] for pair in pairs], expected).pvalue > 0.001


def test_without_observations_the_choice_is_uniform():
    """Each of 10 candidates in 2 of 10 draws: 400 +- 18 (one sigma) of 2000; a seeded draw."""
    chooser, pool = selector("mapp"), Candidates(prompts(10))
    counts = Counter(i for step in range(2000) for i in chooser.choose(pool, step))
    assert sorted(counts) == list(range(10))
    assert all(abs(count - 400) < 4 * 18 for count in counts.values())


@pytest.mark.parametrize("right", [0, 4])
def test_groups_all_solved_or_none_leave_a_choice(right):
    """After 50 visits without an advantage, every prompt can still be chosen, and is reported so:
    the posterior is Beta(9 - eps, 1) or its mirror image, with P = 1 - 9/13 - 24 / (9 .. 13)."""
    chooser, pool = selector("mapp", candidates=3, selected=3), Candidates(prompts(3))
    for step in range(50):
        assert sorted(chooser.choose(pool, step)) == [0, 1, 2]  # K = P
        chooser.observe(pool.prompts, passes(right, right, right))
    chooser.choose(pool, 50)
    limit = float(exact(Fraction(9), Fraction(1), 4))
    assert chooser.metrics() == {"selection/informative": approx(limit)}


def test_prompts_that_are_known_well_are_chosen_by_their_pass_rate():
    """0, 200, 2000, 3800 and 4000 passes of 4000: the middle one most often."""
    chooser = selector("mapp", candidates=5, selected=1, mopps_decay=1.0)
    pool = Candidates(prompts(5))
    chooser.observe(pool.prompts, passes(0, 200, 2000, 3800, 4000, group_size=4000))
    chooser.group_size = 8
    counts = Counter(chooser.choose(pool, step)[0] for step in range(1000))
    assert counts[2] > counts[1] + counts[3] > 10 * (counts[0] + counts[4])
