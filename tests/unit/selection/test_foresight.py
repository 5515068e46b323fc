"""Foresight: the regression, how far it is trusted, the evidence, and the resulting choice."""

import json
import math
from dataclasses import replace

import numpy as np
import torch
from rounding import CHAIN, approx, bound
from scipy import optimize, stats
from scipy.special import expit

from megatron_prepo.records import Prompt
from megatron_prepo.selection.base import Candidates
from megatron_prepo.selection.foresight import features, likelihood, logistic_regression, predict
from tests.unit.selection.selectors import passes, prompts, run_step, selector


def rows(num=60, seed=0):
    """Return a regression problem: x, passes, rollouts, count."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([np.ones((num, 1)), rng.normal(size=(num, 3))], axis=1)
    passed = rng.binomial(8, expit(x @ [0.3, -1.0, 0.5, 0.0]))
    return x, passed.astype(float), np.full(num, 8.0), rng.uniform(0.1, 1, size=num)


def scored(pool, ppl, entropy=None):
    ppl = torch.as_tensor(ppl, dtype=torch.float64)
    return Candidates(pool, ppl, ppl.log() if entropy is None else torch.as_tensor(entropy))


def alike(num, step=0):
    """Return prompts of one length, whose signals carry only the information that is put in."""
    return [Prompt(f"{step}/{i}", "q", "1", (1, 2, 3), (0, 3)) for i in range(num)]


def test_the_regression_is_the_minimum_that_scipy_finds():
    """The objective is the penalised negative log-likelihood, written out here again.

    Its prior makes it convex at least as w^2 / 2 is: a minimum is no farther from a point than the
    gradient there is long, which is scipy's where scipy stops, and rounding for ours.
    """
    x, passed, rollouts, count = rows()

    def objective(weight):
        mu = expit(x @ weight)
        fit = passed * np.log(mu) + (rollouts - passed) * np.log(1 - mu)
        return -(count * fit).sum() + weight @ weight / 2

    def gradient(weight):
        return -((count * (passed - rollouts * expit(x @ weight))) @ x) + weight

    found = optimize.minimize(objective, np.zeros(4), jac=gradient, method="BFGS")
    rounding = bound(CHAIN) * ((count * rollouts) @ abs(x)).sum()
    distance = np.linalg.norm(found.x - logistic_regression(x, passed, rollouts, count))
    assert distance <= np.linalg.norm(found.jac) + rounding < np.linalg.norm(found.x) / 1000


def test_groups_all_alike_do_not_run_away():
    """All passed: without the prior the weights would be infinite; pass rates stay below 1."""
    x, _, rollouts, count = rows()
    weight = logistic_regression(x, rollouts, rollouts, count)
    assert np.isfinite(weight).all() and (predict(x, weight) <= 0.999).all()


def test_the_likelihood_is_the_beta_binomials():
    """The likelihood equals scipy's without the binomial coefficients, which do not depend on m."""
    mu, passed = np.array([0.2, 0.5, 0.9]), np.array([0.0, 3.0, 8.0])
    rollouts, count = np.full(3, 8.0), np.array([1.0, 0.5, 0.25])
    for prior_strength in (0.5, 4.0, 64.0):
        law = stats.betabinom(8, prior_strength * mu, prior_strength * (1 - mu))
        choose = np.log([math.comb(8, int(s)) for s in passed])
        expected = (count * (law.logpmf(passed) - choose)).sum()
        assert likelihood(prior_strength, mu, passed, rollouts, count) == approx(expected)


def test_features_by_hand():
    """log 1, log e and log e^2 have mean 1 and standard deviation sqrt(2/3)."""
    z = math.sqrt(3 / 2)
    x = features(scored(alike(3), [1.0, math.e, math.e**2], entropy=[5.0, 5.0, 5.0]))
    expected = [[1, -z, 0, 0, z * z - 1, -1, -1], [1, 0, 0, 0, -1, -1, -1]]
    assert x[:2] == approx(np.array(expected), scale=1.0)


def test_what_is_not_finite_says_nothing():
    x = features(scored(alike(4), [2.0, math.inf, 4.0, math.nan]))
    assert np.isfinite(x).all()
    assert x[1] == approx(np.array([1, 0, 0, 0, -1, -1, -1]), scale=1.0)
    assert x[0, 1] == approx(-x[2, 1])


def test_features_of_hidden_states_are_standardised_and_have_no_squares():
    """Two features: one that varies, and one that does not and is 0."""
    pool = alike(3)
    plain = scored(pool, [1.0, 2.0, 4.0])
    hidden_PD = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    x_PF = features(replace(plain, hidden_PD=hidden_PD))
    assert np.array_equal(x_PF[:, :7], features(plain))
    assert x_PF[:, 8].tolist() == [0.0, 0.0, 0.0]
    expected = [-math.sqrt(1.5), 0.0, math.sqrt(1.5)]
    assert x_PF[:, 7].tolist() == approx(expected, dtype=torch.float64)


def test_a_hidden_state_tells_hard_from_easy_where_the_rest_says_nothing():
    """Prompts of one perplexity and length pass or fail by their first hidden feature alone."""
    chooser = selector("foresight", candidates=40, selected=10, foresight_hidden=4)
    assert chooser.hidden_features == 4
    shares = []
    for step in range(30):
        draw = torch.Generator().manual_seed(step)
        hidden_PD = torch.randn(40, 4, generator=draw, dtype=torch.float64)
        pool = alike(40, step)
        candidates = replace(scored(pool, [2.0] * 40), hidden_PD=hidden_PD)
        chosen = chooser.choose(candidates, step)
        reach = {p.id: bool(h > 0) for p, h in zip(pool, hidden_PD[:, 0], strict=True)}
        rows = [[1.0, 0.0] * 4 if reach[pool[i].id] else [0.0] * 8 for i in chosen]
        chooser.observe([pool[i] for i in chosen], torch.tensor(rows))
        shares.append(sum(reach[pool[i].id] for i in chosen) / len(chosen))
    assert sum(shares[20:]) / 10 > 0.8


def test_features_of_hidden_states_that_say_nothing_are_not_trusted():
    """32 features fit the groups that they are fitted to; the trust is in what they foresaw."""
    chooser = selector("foresight", candidates=40, selected=8, foresight_hidden=32)
    passing, trusts = np.random.default_rng(3), []
    for step in range(25):
        draw = torch.Generator().manual_seed(step)
        hidden_PD = torch.randn(40, 32, generator=draw, dtype=torch.float64)
        pool = alike(40, step)
        chosen = chooser.choose(replace(scored(pool, [2.0] * 40), hidden_PD=hidden_PD), step)
        trusts.append(chooser.prior_strength)
        rewards_KG = passes(*passing.choice([0, 2, 4], size=8))
        chooser.observe([pool[i] for i in chosen], rewards_KG)
    assert max(trusts[1:]) < trusts[0]  # fitted to its own groups it reaches 64
    restored = selector("foresight", candidates=40, selected=8, foresight_hidden=32)
    restored.load_state_dict(json.loads(json.dumps(chooser.state_dict())))
    last = replace(scored(pool, [2.0] * 40), hidden_PD=hidden_PD)
    assert restored.choose(last, 25) == chooser.choose(last, 25)
    assert restored.prior_strength == chooser.prior_strength


def test_without_observations_every_prompt_is_the_same():
    """Beta(m/2, m/2) at m = 4 for all, and so a uniform choice."""
    chooser = selector("foresight")
    candidates = scored(prompts(10), np.linspace(1.5, 9, 10))
    alpha, beta = chooser.posterior(candidates, features(candidates), 0)
    assert alpha.tolist() == beta.tolist() == [2.0] * 10


def test_evidence_by_hand():
    """3 of 4, then 1 of 4; the first visit counts 0.7 after the second:
    0.7 * 3 + 1 = 3.1 passes and 0.7 * 1 + 3 = 3.7 failures."""
    chooser, pool = selector("foresight", candidates=2, selected=1), prompts(2)
    for step, right in enumerate((3, 1)):
        chooser.choose(scored(pool, [2.0, 3.0]), step)
        chooser.observe(pool[:1], passes(right))
    assert chooser.evidence == {"p0": approx((3.1, 3.7))}
    candidates = scored(pool, [2.0, 3.0])
    alpha, beta = chooser.posterior(candidates, features(candidates), 2)
    (mu,) = {alpha[1] / (alpha[1] + beta[1])}
    assert alpha[1] + beta[1] == approx(chooser.prior_strength) and 0 < mu < 1
    assert alpha[0] + beta[0] == approx(chooser.prior_strength + 6.8)


def test_draws_follow_the_posterior():
    """A prompt of Beta(2, 2) against 1999 others: the chosen draws nearest to the target; here by
    the share of times it is within K of 3, which for equal posteriors is K / P."""
    chooser = selector("foresight", candidates=5, selected=1)
    candidates = scored(prompts(5), [2.0, 3.0, 4.0, 5.0, 6.0])
    counts = np.bincount([chooser.choose(candidates, step)[0] for step in range(2000)], minlength=5)
    assert (abs(counts - 400) < 4 * math.sqrt(2000 * 0.2 * 0.8)).all()


def world(slope, seed, steps=40, num=60, group_size=8):
    """Runs the method where the pass rate is sigmoid(slope * z of log perplexity), no prompt seen
    twice; the selector and the zero-variance ratios of its groups and of all candidates."""
    rng = np.random.default_rng(seed)
    chooser = selector("foresight", candidates=num, selected=12, seed=seed)
    mine, everyones = [], []
    for step in range(steps):
        z = rng.normal(size=num)
        rate = expit(slope * z + (0 if slope else 2.5 * rng.normal(size=num)))
        passed = rng.binomial(group_size, rate)
        zero = (passed == 0) | (passed == group_size)
        candidates = scored(alike(num, step), np.exp(2 + 0.2 * z))
        (chosen,) = run_step(
            chooser,
            candidates,
            step,
            lambda c, passed=passed: passes(*passed[c], group_size=group_size),
        )
        mine.append(zero[chosen].mean())
        everyones.append(zero.mean())
    return chooser, np.mean(mine[5:]), np.mean(everyones[5:])


def test_it_finds_the_prompts_between_easy_and_hard_by_their_perplexity_alone():
    """Slope 4: about half of all groups have zero variance; of the chosen, less than a third of
    that; and the prediction is trusted."""
    chooser, mine, everyones = world(slope=-4.0, seed=1)
    assert everyones > 0.4 and mine < everyones / 3
    assert chooser.prior_strength >= 16


def test_it_trusts_nothing_where_the_signals_say_nothing():
    """Pass rates scatter as widely, but independently of the perplexity: m becomes small, and the
    choice is no worse than a random one."""
    chooser, mine, everyones = world(slope=0.0, seed=2)
    assert chooser.prior_strength <= 2
    assert abs(mine - everyones) < 0.1


def test_history_finds_what_the_signals_cannot():
    """All prompts look alike; half can be done half of the time, half never."""
    chooser, pool = selector("foresight", candidates=40, selected=8, seed=3), alike(40)
    rng, possible = np.random.default_rng(3), []
    for step in range(40):
        candidates = scored(pool, [2.0] * 40)
        (chosen,) = run_step(
            chooser,
            candidates,
            step,
            lambda c: passes(*[rng.binomial(8, 0.5) if i < 20 else 0 for i in c], group_size=8),
        )
        possible.append(np.mean(np.array(chosen) < 20))
    assert np.mean(possible[:3]) < 0.75 and np.mean(possible[-10:]) > 0.9


def test_the_target_can_be_moved():
    """The prompts chosen towards 0.9 are those that nearly always pass."""
    rates = {}
    for target in (0.5, 0.9):
        chooser = selector(
            "foresight", candidates=40, selected=8, target_pass_rate=target, mopps_decay=1.0
        )
        rng, pool, chosen_rates = np.random.default_rng(4), alike(40), []
        for step in range(40):
            (chosen,) = run_step(
                chooser,
                scored(pool, [2.0] * 40),
                step,
                lambda c, rng=rng: passes(*[rng.binomial(8, i / 39) for i in c], group_size=8),
            )
            chosen_rates.append(np.mean(chosen) / 39)
        rates[target] = np.mean(chosen_rates[-10:])
    assert abs(rates[0.5] - 0.5) < 0.1 and rates[0.9] > 0.75


def test_it_remembers_a_bounded_number_of_groups(monkeypatch):
    monkeypatch.setattr("megatron_prepo.selection.foresight.MAX_GROUPS", 5)
    chooser = selector("foresight", candidates=4, selected=2, foresight_hidden=1)
    for step in range(4):
        hidden_PD = torch.arange(4, dtype=torch.float64)[:, None]
        candidates = replace(scored(alike(4, step), [2, 3, 4, 5]), hidden_PD=hidden_PD)
        run_step(chooser, candidates, step, lambda c: passes(*[2] * 2))
    assert len(chooser.counts) == len(chooser.features) == len(chooser.foreseen) == 5
    assert chooser.counts[-1] == (3, 2, 4)


def test_old_groups_are_forgotten():
    """A low perplexity means easy at first, and hard 60 steps later: the later rows decide, though
    there are as many early ones."""
    chooser = selector("foresight", candidates=8, selected=4)
    ppl = np.exp(np.linspace(0, 2, 8))
    for step, right in ((0, 4), (60, 0)):
        candidates = scored(alike(8, step), ppl)
        chooser.choose(candidates, step)
        low, high = candidates.prompts[:4], candidates.prompts[4:]
        chooser.observe([*low, *high], passes(*[right] * 4, *[4 - right] * 4))
    candidates = scored(alike(8, 61), ppl)
    alpha, beta = chooser.posterior(candidates, features(candidates), 61)
    rate = alpha / (alpha + beta)
    assert rate[0] < 0.4 < 0.6 < rate[-1]
