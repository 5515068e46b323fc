"""KGPS: the filter of a prompt's logit, its drift with the updates, and the expected utility."""

import math

import numpy as np
import pytest
from rounding import approx
from scipy import integrate, stats
from scipy.special import expit

from megatron_prepo.selection.base import Candidates
from megatron_prepo.selection.kgps import expected_variance, filtered, observation
from tests.unit.selection.selectors import passes, prompts, run_step, selector


def test_three_visits_by_a_scalar_filter():
    """3, then 0, then 4 right of 4, from N(0, 2); two updates of equal size after each visit.

    Logits log(3.5/1.5), log(0.5/4.5), log(4.5/0.5); variances 1/3.5 + 1/1.5, 1/0.5 + 1/4.5 twice.
    """
    chooser = selector("kgps", kgps_prior_variance=2.0, kgps_drift=0.1)
    mean, variance = 0.0, 2.0
    for right, logit, noise in [
        (3, math.log(3.5 / 1.5), 1 / 3.5 + 1 / 1.5),
        (0, math.log(0.5 / 4.5), 1 / 0.5 + 1 / 4.5),
        (4, math.log(4.5 / 0.5), 1 / 4.5 + 1 / 0.5),
    ]:
        chooser.observe(prompts(1), passes(right))
        precision = 1 / variance + 1 / noise  # the product of two normal densities
        mean, variance = (mean / variance + logit / noise) / precision, 1 / precision
        assert chooser.belief("p0") == approx((mean, variance), scale=2.0)
        for _ in range(2):
            chooser.observe_update(0.3)
        variance = min(variance + 2 * 0.1, 2.0)
        assert chooser.belief("p0") == approx((mean, variance), scale=2.0)


def test_limits_of_the_observations_noise():
    """Believe the observation without noise; with infinite noise, or no doubt, ignore it."""
    assert filtered(1.0, 2.0, 5.0, 0.0) == (5.0, 0.0)
    assert filtered(1.0, 2.0, 5.0, math.inf) == (1.0, 2.0)
    assert filtered(1.0, 0.0, 5.0, 3.0) == (1.0, 0.0)


def test_the_noise_grows_with_the_square_of_the_updates_size():
    """Sizes 2, 2, 8: relative to the means so far, 2, 2 and 4, they are 1, 1 and 2."""
    chooser = selector("kgps", kgps_drift=0.01)
    added = []
    for size in (2.0, 2.0, 8.0):
        before = chooser.drift
        chooser.observe_update(size)
        added.append(chooser.drift - before)
    assert added == approx([0.01, 0.01, 0.04])
    skipping = selector("kgps", kgps_drift=0.01)
    for size in (0.0, 2.0, 0.0, 2.0, 8.0):
        skipping.observe_update(size)
    assert skipping.drift == chooser.drift, "a skipped update is no part of the mean"
    units = selector("kgps", kgps_drift=0.01)
    for size in (2e-9, 2e-9, 8e-9):
        units.observe_update(size)
    assert units.drift == approx(chooser.drift)


def test_without_updates_or_without_drift_nothing_is_forgotten():
    """Skipped updates have size 0; the first one divides by no mean."""
    for settings, size in (({}, 0.0), ({"kgps_drift": 0.0}, 1.0)):
        chooser = selector("kgps", **settings)
        chooser.observe(prompts(1), passes(2))
        before = chooser.belief("p0")
        for _ in range(10):
            chooser.observe_update(size)
        assert chooser.belief("p0") == before and chooser.drift == 0


def test_a_prompt_is_never_less_known_than_an_unseen_one():
    chooser = selector("kgps", kgps_drift=1.0, kgps_prior_variance=3.0)
    chooser.observe(prompts(1), passes(4))
    for _ in range(100):
        chooser.observe_update(1.0)
    mean, variance = chooser.belief("p0")
    assert variance == 3.0 and mean > 0
    assert chooser.belief("p1") == (0.0, 3.0)


@pytest.mark.parametrize("right", range(5))
def test_observed_logits_are_finite_and_symmetric(right):
    logit, variance = observation(right, 4)
    assert math.isfinite(logit)
    assert observation(4 - right, 4) == approx((-logit, variance), scale=1.0)


@pytest.mark.parametrize("mean", [0.0, 1.0, -2.5])
def test_the_utility_is_the_integral(mean):
    """Compare to 4 % with 5 nodes up to the prior's variance; exact without variance."""
    for variance in (0.1, 1.0, 3.29):
        law = stats.norm(mean, variance**0.5)

        def density(x, law=law):
            return expit(x) * (1 - expit(x)) * law.pdf(x)

        expected, _ = integrate.quad(density, -30, 30)
        (found,) = expected_variance(np.array([mean]), np.array([variance]))
        assert abs(found - expected) < 0.04 * expected
    (found,) = expected_variance(np.array([mean]), np.array([0.0]))
    assert found == approx(expit(mean) * (1 - expit(mean)))


def test_uncertainty_counts_for_prompts_far_from_one_half():
    """Doubt lowers the utility where the mean is 1/2, and raises it far from there."""
    even = expected_variance(np.zeros(2), np.array([0.1, 3.0]))
    far = expected_variance(np.full(2, 4.0), np.array([0.1, 3.0]))
    assert even[0] > even[1] and far[0] < far[1]


def test_prompts_that_are_known_well_are_chosen_by_their_pass_rate():
    """0, 800, 2100, 3000 and 4000 passes of 4000; the two nearest to 1/2, nearest first."""
    chooser = selector("kgps", candidates=5)
    pool = Candidates(prompts(5))
    chooser.observe(pool.prompts, passes(0, 800, 2100, 3000, 4000, group_size=4000))
    assert chooser.choose(pool, 3) == [2, 3]
    means = [chooser.belief(f"p{i}")[0] for i in range(5)]
    assert means[2] == approx(math.log(2100.5 / 1900.5) * 3.29 / (3.29 + 1 / 2100.5 + 1 / 1900.5))
    utility = expected_variance(*np.array([chooser.belief(f"p{i}") for i in (2, 3)]).T).mean()
    assert chooser.metrics() == {"selection/utility": approx(utility), "selection/drift": 0.0}


@pytest.mark.parametrize("right", [0, 4])
def test_groups_all_solved_or_none_make_way_for_unseen_prompts(right):
    """K of P prompts without an advantage are not chosen again while there are unseen ones."""
    chooser, pool = selector("kgps", candidates=6), Candidates(prompts(6))
    seen = []
    for step in range(3):
        [chosen] = run_step(chooser, pool, step, lambda c: passes(*[right] * len(c)))
        seen += chosen
    assert seen == [0, 1, 2, 3, 4, 5]  # ties keep their order


def test_all_candidates_where_all_are_selected():
    chooser = selector("kgps", candidates=3, selected=3)
    assert chooser.choose(Candidates(prompts(3)), 0) == [0, 1, 2]


def test_the_first_steps_can_be_random():
    chooser, pool = selector("kgps", kgps_warm_up=3, selected=3), Candidates(prompts(10))
    chosen = [chooser.choose(pool, step) for step in range(5)]
    assert chosen[3:] == [[0, 1, 2]] * 2
    assert len({tuple(c) for c in chosen[:3]}) == 3 and all(len({*c}) == 3 for c in chosen)
    other = selector("kgps", kgps_warm_up=3, selected=3, seed=2)
    assert [other.choose(pool, step) for step in range(3)] != chosen[:3]
