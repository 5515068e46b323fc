"""MoPPS: the posterior of a prompt's pass rate, and the draws from it."""

from collections import Counter

import pytest
import torch
from rounding import approx
from scipy import stats

from megatron_prepo.selection.base import Candidates
from tests.unit.selection.selectors import passes, prompts, run_step, selector


@pytest.mark.parametrize(
    ("decay", "posteriors"),
    [
        (0.5, [(5, 1), (4, 4), (2.5, 6.5)]),
        (1.0, [(5, 1), (6, 4), (6, 8)]),
        (0.0, [(5, 1), (2, 4), (1, 5)]),
    ],
)
def test_three_observations_by_hand(decay, posteriors):
    """4, 1 and 0 right of 4, from Beta(1, 1); with lambda = 1/2:

    alpha: 1/2 * 1 + 1/2 + 4 = 5,   1/2 * 5 + 1/2 + 1 = 4,   1/2 * 4 + 1/2 + 0 = 2.5
    beta:  1/2 * 1 + 1/2 + 0 = 1,   1/2 * 1 + 1/2 + 3 = 4,   1/2 * 4 + 1/2 + 4 = 6.5
    """
    chooser, seen = selector("mopps", mopps_decay=decay), []
    for right in (4, 1, 0):
        chooser.observe(prompts(1), passes(right))
        seen.append(chooser.beta("p0"))
    assert seen == posteriors
    assert chooser.mean("p0") == posteriors[-1][0] / sum(posteriors[-1])


def test_a_pass_is_the_largest_reward():
    """One pass of four, though the mean reward is 0.3; and where the largest is 0.5, all pass."""
    chooser = selector("mopps", mopps_decay=1.0)
    chooser.observe(prompts(1), torch.tensor([[1.0, 0.1, 0.1, 0.0]]))
    assert chooser.beta("p0") == (2, 4)
    chooser = selector("mopps", mopps_decay=1.0, pass_reward=0.5)
    chooser.observe(prompts(1), torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    assert chooser.beta("p0") == (5, 1)


def test_a_prompt_that_is_not_rolled_out_keeps_its_posterior():
    chooser, pool = selector("mopps"), prompts(2)
    chooser.observe(pool, passes(3, 2))
    chooser.observe(pool[1:], passes(0))
    assert chooser.beta("p0") == (4, 2)


def test_draws_follow_the_posteriors():
    """Kolmogorov-Smirnov test of 2000 seeded draws each: p-values above 0.001."""
    chooser, pool = selector("mopps"), prompts(3)
    chooser.posterior = {"p1": (5.0, 1.0), "p2": (2.5, 6.5)}
    draws = torch.tensor([chooser.draw(Candidates(pool), step) for step in range(2000)])
    for i, parameters in enumerate([(1, 1), (5, 1), (2.5, 6.5)]):
        assert stats.kstest(draws[:, i].numpy(), "beta", args=parameters).pvalue > 0.001
    assert abs(stats.pearsonr(draws[:, 0], draws[:, 1]).statistic) < 4 / 2000**0.5


@pytest.mark.parametrize("target", [0.5, 0.9])
def test_without_observations_the_choice_is_uniform(target):
    """Each of 10 candidates in 2 of 10 draws: 400 +- 18 (one sigma) of 2000; a seeded draw."""
    chooser, pool = selector("mopps", target_pass_rate=target), Candidates(prompts(10))
    counts = Counter(i for step in range(2000) for i in chooser.choose(pool, step))
    assert sorted(counts) == list(range(10))
    assert all(abs(count - 400) < 4 * 18 for count in counts.values())


def test_the_draws_nearest_to_the_target_are_chosen_nearest_first():
    chooser, pool = selector("mopps", selected=4, target_pass_rate=0.3), Candidates(prompts(10))
    draws_P = torch.tensor(chooser.draw(pool, 7))
    assert chooser.choose(pool, 7) == (draws_P - 0.3).abs().argsort()[:4].tolist()


def test_prompts_that_are_known_well_are_chosen_by_their_pass_rate():
    """0, 800, 2100, 3000 and 4000 passes of 4000: the posteriors are 0.01 wide."""
    chooser = selector("mopps", candidates=5, mopps_decay=1.0)
    pool = Candidates(prompts(5))
    chooser.observe(pool.prompts, passes(0, 800, 2100, 3000, 4000, group_size=4000))
    for step in range(20):
        assert chooser.choose(pool, step) == [2, 3]
    mean = chooser.metrics()["selection/posterior_mean"]
    assert mean == approx((2101 / 4002 + 3001 / 4002) / 2)
    chooser.target = 0.05
    assert chooser.choose(pool, 0) == [0, 1]


def test_the_pass_rates_of_a_steady_policy_are_found():
    """20 prompts of pass rate 0.05, 0.1, ..., 1 for 100 steps of 4 with 8 rollouts: what is chosen
    in the second half passes 0.5 +- 0.1 of the time, where a uniform choice would pass 0.525, but
    three in four of the choices lie within 0.25 of 0.5, where half of the prompts do.
    """
    chooser = selector("mopps", candidates=20, selected=4, mopps_decay=1.0)
    pool, generator = Candidates(prompts(20)), torch.Generator().manual_seed(1)

    def reward(chosen):
        rate_K = (torch.tensor(chosen) + 1) / 20
        return (torch.rand(len(chosen), 8, generator=generator) < rate_K[:, None]).float()

    chosen = [run_step(chooser, pool, step, reward)[0] for step in range(100)]
    rate_N = (torch.tensor(chosen[50:]).flatten() + 1) / 20
    assert abs(rate_N.mean() - 0.5) < 0.1
    assert ((rate_N - 0.5).abs() < 0.25).float().mean() > 0.75
