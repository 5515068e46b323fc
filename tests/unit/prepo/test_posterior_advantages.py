"""Advantages predicted by the posterior: MaPP's formula, its limits, and the averages it states."""

from dataclasses import dataclass
from itertools import product
from math import comb, sqrt

import pytest
import torch
from rounding import approx, assert_close
from scipy import integrate, special, stats

from megatron_prepo.config import Config
from megatron_prepo.prepo.advantages import group_advantages
from megatron_prepo.prepo.posterior_advantages import posterior_advantages, predictive
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.selection import METHODS
from megatron_prepo.selection.base import Selector
from megatron_prepo.trainer.groups import Groups
from megatron_prepo.trainer.stages import compute_advantages
from tests.tiny_models import actor_config

PAPERS = {"std": "population", "eps": 0.0}
"""Normalisation in the paper."""


def one_group(passed, alpha, beta, **settings):
    (advantage_G,) = posterior_advantages(
        torch.tensor([passed], dtype=torch.bool),
        torch.tensor([alpha]),
        torch.tensor([beta]),
        **settings,
    )
    return advantage_G.tolist()


def test_the_papers_closed_form():
    """Equation 14: for a pass, sum over S of w_S(alpha', beta') sqrt((G - S) / S); for a failure
    with alpha' and beta' exchanged, and negative."""
    passed, alpha, beta = [1, 0, 0, 1, 0], 4.5, 3.25

    def formula(a, b):
        return sum(
            comb(4, s - 1) * special.beta(a + s - 1, b + 5 - s) / special.beta(a, b)
            * sqrt((5 - s) / s)
            for s in range(1, 5)
        )  # fmt: skip

    expected = {1: formula(alpha - 1, beta), 0: -formula(beta - 1, alpha)}
    assert one_group(passed, alpha, beta, **PAPERS) == approx([expected[r] for r in passed])


def test_two_rollouts_by_hand():
    """G = 2 after one pass and one failure from Beta(1, 1), undecayed: alpha = beta = 2.

    Without the pass it is Beta(1, 2): the remaining one fails with probability 2/3, and then the
    advantage is 1; if both pass, it is 0.
    """
    assert one_group([1, 0], 2.0, 2.0, **PAPERS) == approx([2 / 3, -2 / 3])


@pytest.mark.parametrize("std", ["unbiased", "population", "none"])
def test_it_is_the_integral_of_the_mean_advantage_at_each_pass_rate(std):
    """The mean advantage at a pass rate is taken over all outcomes of the remaining ones."""

    def mean_advantage(rate, first):
        total = 0.0
        for others in product([0.0, 1.0], repeat=3):
            chance = rate ** sum(others) * (1 - rate) ** (3 - sum(others))
            rewards_1G = torch.tensor([[first, *others]])
            total += chance * float(group_advantages(rewards_1G, std=std)[0, 0])
        return total

    alpha, beta = 3.5, 2.25
    found = one_group([1, 0, 1, 0], alpha, beta, std=std)
    for first, own, law in [
        (1.0, found[0], stats.beta(alpha - 1, beta)),
        (0.0, found[1], stats.beta(alpha, beta - 1)),
    ]:
        expected, error = integrate.quad(
            lambda p, f=first, w=law: mean_advantage(p, f) * w.pdf(p), 0, 1
        )
        assert abs(own - expected) <= error


def test_with_certainty_only_the_correctness_counts():
    """Beta(10^9, 10^9) at G = 4: the pass rate is 1/2 +- 2e-5, the remaining ones are binomial."""
    realised = [sqrt(3), 1.0, sqrt(1 / 3), 0.0]
    expected = sum(comb(3, m) / 8 * a for m, a in enumerate(realised))
    for passed in ([1, 0, 0, 0], [1, 1, 1, 0]):
        found = one_group(passed, 1e9, 1e9, **PAPERS)
        assert abs(found[0] - expected) < 4 / 1e9 > abs(found[-1] + expected)


def test_groups_of_equal_rewards_have_an_advantage():
    """All pass at the first visit of 4, from Beta(1, 1): alpha = 5, beta = 1; left out, Beta(4, 1),
    whose predicted counts of 3 are 1/35, 4/35, 10/35 and 20/35; and the mirror image."""
    realised = [sqrt(3), 1.0, sqrt(1 / 3), 0.0]
    expected = sum(w / 35 * a for w, a in zip([1, 4, 10, 20], realised, strict=True))
    assert one_group([1] * 4, 5.0, 1.0, **PAPERS) == approx([expected] * 4)
    assert one_group([0] * 4, 1.0, 5.0, **PAPERS) == approx([-expected] * 4)


def test_predictions_are_scipys_beta_binomial():
    alpha_K = torch.tensor([1.0, 2.5, 40.0]).double()
    beta_K = torch.tensor([1.0, 6.5, 3.0]).double()
    found_KM = predictive(alpha_K, beta_K, 7)
    for found_M, alpha, beta in zip(found_KM, alpha_K.tolist(), beta_K.tolist(), strict=True):
        expected_M = torch.tensor([stats.betabinom(7, alpha, beta).pmf(m) for m in range(8)])
        assert_close(found_M, expected_M.double(), operations=2000)  # scipy's: logarithms
    assert_close(found_KM.sum(dim=1), torch.ones(3).double(), operations=2000)


def test_groups_do_not_see_each_other():
    passed_KG = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    alpha_K, beta_K = torch.tensor([2.0, 4.0, 1.0]), torch.tensor([3.0, 1.0, 4.0])
    whole_KG = posterior_advantages(passed_KG, alpha_K, beta_K)
    for k in range(3):
        alone = posterior_advantages(passed_KG[[k]], alpha_K[[k]], beta_K[[k]])
        assert torch.equal(alone[0], whole_KG[k])
    assert whole_KG.isfinite().all() and whole_KG.dtype == torch.float64


@dataclass
class Trainer:
    """As much of a trainer as the advantages need."""

    config: Config
    selector: Selector


@pytest.mark.parametrize(("method", "decay"), [("mapp", 1.0), ("mopps", 0.5)])
def test_the_loops_stage_asks_the_selector_after_it_has_observed_the_groups(method, decay):
    """From Beta(1, 1), which a discount keeps: 3 passes of 4 are Beta(4, 2), none Beta(1, 5).

    A reward of 0.5 is a failure, of exactly `reward.high` a pass.
    """
    settings = {"std": "population", "eps": 0.25}
    config = actor_config(
        "unused",
        advantage={"method": "posterior", **settings},
        selection={"method": method, "mopps_decay": decay},
    )
    selector = METHODS[method](config.selection, total_steps=1, seed=1, pass_reward=1.0)
    prompts = [Prompt(f"p{k}", "", "", (5, 6), (0, 2)) for k in range(2)]
    rewards_KG = torch.tensor([[1.0, 0.5, 1.0, 1.0], [0.0, 0.5, 0.0, 0.0]])
    rollouts = [Rollout(p, (7,), (-1.0,), "", True, 0) for p in prompts for _ in range(4)]
    grades = [Grade(reward) for reward in rewards_KG.flatten().tolist()]
    selector.observe(prompts, rewards_KG)
    groups = Groups().extend((0, 1), rollouts, grades)
    advantage_N, advantages_T = compute_advantages(Trainer(config, selector), groups, None)
    advantages_KG = advantage_N.view(2, 4)
    assert advantages_T is None
    assert advantages_KG[0].tolist() == approx(one_group([1, 0, 1, 1], 4.0, 2.0, **settings))
    assert advantages_KG[1].tolist() == approx(one_group([0, 0, 0, 0], 1.0, 5.0, **settings))
