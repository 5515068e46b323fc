"""VIP: the sizes of least variance, against all others, and the prediction of pass rates."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from rounding import approx

from megatron_prepo.prepo.advantages import group_advantages, leave_one_out_advantages
from megatron_prepo.records import Prompt
from megatron_prepo.selection import vip
from megatron_prepo.selection.base import Candidates
from megatron_prepo.selection.vip import VARIANCE, embeddings, shared, token_counts
from tests.unit.selection.selectors import passes, prompts, selector


@pytest.mark.parametrize("variance", VARIANCE)
def test_sizes_have_the_least_variance_of_all(variance):
    """Every way to share 20 rollouts among 4 prompts, 3 to 9 each."""
    of = VARIANCE[variance]
    ways = [n for n in itertools.product(range(3, 10), repeat=4) if sum(n) == 20]
    generator = np.random.default_rng(0)
    for scale_K in generator.uniform(0, 0.25, size=(30, 4)).tolist():
        found = shared(scale_K, 20, (3, 9), of)
        least = min(sum(a * of(n) for a, n in zip(scale_K, way, strict=True)) for way in ways)
        assert sum(found) == 20 and all(3 <= n <= 9 for n in found)
        assert sum(a * of(n) for a, n in zip(scale_K, found, strict=True)) == approx(least)


def test_sizes_of_leave_one_out_grow_with_the_standard_deviation():
    """n - 1 in proportion to sqrt(p (1 - p)): 0.5 and 0.3 of 16 are 10 and 6."""
    assert shared([0.25, 0.09], 18, (3, 16), VARIANCE["rloo"]) == [11, 7]


def test_equal_prompts_share_equally_and_the_first_get_the_rest():
    assert shared([0.2] * 3, 13, (3, 8), VARIANCE["rloo"]) == [5, 4, 4]
    assert shared([0.0] * 3, 13, (4, 8), VARIANCE["group"]) == [5, 4, 4]
    assert shared([0.2, 0.1], 8, (4, 4), VARIANCE["rloo"]) == [4, 4]


def test_before_any_observation_each_prompt_has_g_rollouts():
    chooser = selector("vip", candidates=6, selected=3)
    chosen = chooser.choose(Candidates(prompts(6)), 0)
    assert chosen == selector("random", candidates=6, selected=3).choose(Candidates(prompts(6)), 0)
    assert chooser.group_sizes(prompts(3), 8) == [8, 8, 8]
    assert chooser.metrics()["selection/predicted_pass_rate"] == 0.5


@pytest.mark.parametrize("estimator", list(VARIANCE))
@pytest.mark.parametrize(("n", "rate"), [(3, 0.5), (4, 0.2), (6, 0.9)])
def test_the_variance_is_that_of_a_mean_gradient(estimator, n, rate):
    """Sum over all rewards of n rollouts, with gradients of log pi that do not depend on them.

    These have variance 1: that of their mean is the mean of the squared advantages over n.
    """
    advantages = {
        "rloo": leave_one_out_advantages,
        "group": lambda rewards_KG: group_advantages(rewards_KG, std="none"),
    }
    rewards_KG = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)
    passes_K = rewards_KG.sum(dim=1)
    probability_K = rate**passes_K * (1 - rate) ** (n - passes_K)
    variance_K = (advantages[estimator](rewards_KG) ** 2).sum(dim=1) / n**2
    found = float((probability_K * variance_K).sum())
    assert found == approx(rate * (1 - rate) * VARIANCE[estimator](n), 1000)


def of_tokens(name: str, *tokens: int) -> Prompt:
    return Prompt(name, "", "", (1, *tokens, 2), (1, 1 + len(tokens)))


def test_an_embedding_counts_the_tokens_of_the_text():
    """Order does not matter, nor do the tokens of a template around them."""
    one, other = of_tokens("a", 5, 9, 9), of_tokens("b", 9, 5, 9)
    assert token_counts(one) == token_counts(other) and sum(token_counts(one)) == 3
    x_KE = embeddings([one, of_tokens("c", 5, 9, 9, 5, 9, 9), of_tokens("d")])
    assert (x_KE**2).sum(axis=1).tolist() == approx([1.0, 1.0, 0.0])
    assert x_KE[0].tolist() == approx(x_KE[1].tolist())


def test_one_observation_moves_the_others_by_their_similarity():
    """3 of 4 pass: z = log(3.5 / 1.5), r = 1/3.5 + 1/1.5; tokens in other places are at sqrt 2."""
    first, same, far = of_tokens("a", 5), of_tokens("b", 5, 5), of_tokens("c", 6)
    assert token_counts(first) != token_counts(far)
    chooser = selector("vip", vip_bandwidth=1.0)
    chooser.observe([first], passes(3))
    logit, noise = math.log(3.5 / 1.5), 1 / 3.5 + 1 / 1.5
    alpha = logit / (1 + noise)
    assert chooser.logits([first, same, far]).tolist() == approx(
        [logit, alpha, alpha * math.exp(-1)]
    )


def test_later_observations_move_earlier_ones():
    """The prompt's own logit, then what others have added since."""
    first, same = of_tokens("a", 5), of_tokens("b", 5)
    chooser = selector("vip", vip_bandwidth=1.0)
    chooser.observe([first], passes(3))
    own, other = chooser.logits([first, same])
    chooser.observe([same], passes(0))
    logit, noise = math.log(0.5 / 4.5), 1 / 0.5 + 1 / 4.5
    moved = (logit - other) / (1 + noise)
    assert chooser.logits([first, same]).tolist() == approx([own + moved, logit])


def test_prompts_of_a_step_are_observed_together_and_in_any_order():
    """Groups may differ in size; the process solves for all of them."""
    known = [of_tokens("a", 5, 6), of_tokens("b", 5), of_tokens("c", 7)]
    rows = (torch.tensor([1.0, 0, 0]), torch.tensor([1.0, 1, 0, 1, 1]), torch.tensor([0.0] * 4))
    found = []
    for order in ([0, 1, 2], [2, 0, 1]):
        chooser = selector("vip", vip_bandwidth=0.8)
        chooser.observe([known[k] for k in order], tuple(rows[k] for k in order))
        found.append(chooser.logits([*known, of_tokens("d", 6)]).tolist())
    assert found[0] == approx(found[1], scale=2.0)
    expected = [math.log(1.5 / 2.5), math.log(4.5 / 1.5), math.log(0.5 / 4.5)]
    assert found[0][:3] == approx(expected)


def test_more_rollouts_go_where_passes_and_failures_are_likely():
    chooser, known = selector("vip", candidates=4, selected=3), prompts(4)
    chooser.choose(Candidates(known), 0)
    for _ in range(3):
        chooser.observe(known[:3], passes(0, 2, 4))
    few, most, many = chooser.group_sizes(known[:3], 8)
    assert few + most + many == 24 and most > few >= 4 and most > many >= 4


def test_old_observations_count_for_their_own_prompts_only(monkeypatch):
    monkeypatch.setattr(vip, "MAX_GROUPS", 2)
    chooser, known = selector("vip", vip_bandwidth=1.0), [of_tokens(n, 5) for n in "abcd"]
    for prompt in known[:3]:
        chooser.observe([prompt], passes(3))
    assert len(chooser.alpha) == len(chooser.counts) == 2 and chooser.num_dropped == 1
    logit = math.log(3.5 / 1.5)
    assert chooser.logits(known).tolist() == approx(
        [logit + sum(chooser.alpha), logit + chooser.alpha[1], logit, sum(chooser.alpha)]
    )
    again = selector("vip", vip_bandwidth=1.0)
    again.load_state_dict(json.loads(json.dumps(chooser.state_dict())))
    assert again.logits(known).tolist() == chooser.logits(known).tolist()


def test_the_bandwidth_is_the_median_distance_of_the_first_candidates():
    chooser = selector("vip", candidates=3, selected=1)
    known = [of_tokens("a", 5), of_tokens("b", 6), of_tokens("c", 5, 6)]
    chooser.choose(Candidates(known), 0)
    assert chooser.bandwidth == approx(math.sqrt(2 - math.sqrt(2)))
    chooser.choose(Candidates([of_tokens(n, 5) for n in "xyz"]), 1)
    assert chooser.bandwidth == approx(math.sqrt(2 - math.sqrt(2)))
    equal = selector("vip", candidates=3, selected=1)
    equal.choose(Candidates([of_tokens(n, 5) for n in "xyz"]), 0)
    assert equal.bandwidth == 1.0
