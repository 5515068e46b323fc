"""The objectives of `loss.policy`: closed forms, gradients, and the formulas of verl and TRL.

Those formulas are written out here as these libraries publish them: on matrices with one padded row
per rollout, and with a mask.
"""

import math
from functools import partial

import pytest
import torch
from rounding import approx, assert_close, assert_gradients
from torch.nn.utils.rnn import pad_sequence

from megatron_prepo.config import LossConfig
from megatron_prepo.prepo.advantages import group_advantages
from megatron_prepo.prepo.loss import (
    LossTerms,
    cispo,
    clipped,
    dual_clipped,
    gspo,
    policy_loss,
    rollout_coefficients,
)
from tests.unit.prepo.test_loss import LENGTHS_N, batch, one_token, per_token

LOW, HIGH = 0.1, 0.15
CLIPS = {"clip_low": LOW, "clip_high": HIGH}
DUAL = 1.25
WEIGHT_N = torch.tensor([0.5, 2.0, 1.0, 0.7], dtype=torch.float64)
POLICIES = {
    "dual-clip": partial(dual_clipped, dual_clip=DUAL),
    "cispo": cispo,
    "gspo": partial(gspo, here_M=LENGTHS_N, lengths_M=LENGTHS_N),
}


def padded(values_T):
    """Return a row for each rollout."""
    return pad_sequence(values_T.split(LENGTHS_N.tolist()), batch_first=True)


def verl_dual_clip(logprobs_NS, old_NS, advantage_NS, _):
    ratio_NS = (logprobs_NS - old_NS).exp()
    plain_NS, clip_NS = -advantage_NS * ratio_NS, -advantage_NS * ratio_NS.clamp(1 - LOW, 1 + HIGH)
    larger_NS = torch.maximum(plain_NS, clip_NS)
    bounded_NS = torch.minimum(-advantage_NS * DUAL, larger_NS)
    return torch.where(advantage_NS < 0, bounded_NS, larger_NS)


def trl_two_sided_clip(logprobs_NS, old_NS, advantage_NS, _):
    ratio_NS = (logprobs_NS - old_NS).exp()
    plain_NS = ratio_NS.clamp(max=DUAL) * advantage_NS
    return -torch.minimum(plain_NS, ratio_NS.clamp(1 - LOW, 1 + HIGH) * advantage_NS)


def verl_cispo(logprobs_NS, old_NS, advantage_NS, _):
    weight_NS = (logprobs_NS - old_NS).exp().clamp(1 - LOW, 1 + HIGH).detach()
    return -weight_NS * advantage_NS * logprobs_NS


def verl_gspo(logprobs_NS, old_NS, advantage_NS, mask_NS):
    mean_N1 = ((logprobs_NS - old_NS) * mask_NS).sum(1, keepdim=True) / mask_NS.sum(1, keepdim=True)
    ratio_NS = (logprobs_NS - logprobs_NS.detach() + mean_N1.detach()).exp()
    clip_NS = ratio_NS.clamp(1 - LOW, 1 + HIGH)
    return torch.maximum(-advantage_NS * ratio_NS, -advantage_NS * clip_NS)


def trl_sequence_level(logprobs_NS, old_NS, advantage_NS, mask_NS):
    mean_N1 = ((logprobs_NS - old_NS) * mask_NS).sum(1, keepdim=True) / mask_NS.sum(1, keepdim=True)
    ratio_N1 = mean_N1.exp()
    clip_N1 = ratio_N1.clamp(1 - LOW, 1 + HIGH)
    return -torch.minimum(ratio_N1 * advantage_NS, clip_N1 * advantage_NS)


PUBLISHED = {
    "verl's dual clip": ("dual-clip", verl_dual_clip),
    "TRL's two-sided clip": ("dual-clip", trl_two_sided_clip),
    "verl's CISPO": ("cispo", verl_cispo),
    "verl's GSPO, by token": ("gspo", verl_gspo),
    "TRL's GSPO, by sequence": ("gspo", trl_sequence_level),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_loss_and_gradient_are_those_of_the_published_formula(name):
    """Entropy weights, and ratios within and beyond the clips."""
    policy, formula = PUBLISHED[name]
    logprobs_T, entropy_T, terms = batch("token-mean", WEIGHT_N)
    loss, sums = policy_loss(logprobs_T, entropy_T, terms, objective=POLICIES[policy], **CLIPS)
    matrices = [padded(x_T) for x_T in (logprobs_T, terms.old_logprobs_T, terms.advantage_T)]
    mask_NS = padded(torch.ones(10))
    losses_NS = formula(*matrices, mask_NS)
    expected = (padded(terms.coefficient_T) * losses_NS * mask_NS).sum()
    assert loss.item() == approx(expected.item())
    assert_close(*(torch.autograd.grad(x, logprobs_T)[0] for x in (loss, expected)), scale=1.0)
    assert 0 < sums["clipped"] < 10


@pytest.mark.parametrize("policy", POLICIES)
def test_the_gradient_at_ratio_one_is_the_policy_gradient(policy):
    """- sum_t c A grad log p; nothing is clipped."""
    logprobs_T, entropy_T, terms = batch("token-mean", WEIGHT_N)
    terms = LossTerms(logprobs_T.detach(), terms.advantage_T, terms.coefficient_T)
    loss, sums = policy_loss(logprobs_T, entropy_T, terms, objective=POLICIES[policy], **CLIPS)
    (gradient_T,) = torch.autograd.grad(loss, logprobs_T)
    assert_close(gradient_T, -terms.coefficient_T * terms.advantage_T)
    assert sums["clipped"] == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_weight_scales_the_gradient_of_its_rollout_and_of_no_other(policy):
    gradients = []
    for weights in (WEIGHT_N, None):
        logprobs_T, entropy_T, terms = batch(weight_N=weights)
        loss, _ = policy_loss(logprobs_T, entropy_T, terms, objective=POLICIES[policy], **CLIPS)
        gradients += torch.autograd.grad(loss, logprobs_T)
    assert_close(gradients[0], per_token(WEIGHT_N) * gradients[1])


@pytest.mark.parametrize("policy", POLICIES)
def test_importance_bonus_and_penalty_are_those_of_the_clipped_loss(policy):
    """What they change of the gradient does not depend on the policy, where no ratio is clipped."""
    optional = {
        "importance_T": torch.linspace(0.5, 2, 10).double(),
        "reference_logprobs_T": torch.linspace(-2, 0, 10).double(),
    }
    settings = {"entropy_coef": 0.1, "kl_coef": 0.2, **CLIPS}
    gradients = []
    for objective in (POLICIES[policy], clipped):
        logprobs_T, entropy_T, terms = batch("token-mean", WEIGHT_N, **optional)
        on_policy = LossTerms(**vars(terms) | {"old_logprobs_T": logprobs_T.detach()})
        loss, _ = policy_loss(logprobs_T, entropy_T, on_policy, objective=objective, **settings)
        gradients.append(torch.autograd.grad(loss, (logprobs_T, entropy_T)))
    assert_close(*gradients)


# Dual clip


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "gradient"),
    [(4.0, -2.0, -6.0, 0.0), (2.5, -2.0, -5.0, -5.0), (0.5, -2.0, -1.6, 0.0), (4.0, 2.0, 2.56, 0)],
)
def test_dual_clip_by_hand(ratio, advantage, objective, gradient):
    """Bound 3: it replaces ratio 4, no lower one, and nothing where the advantage is positive."""
    bound = partial(dual_clipped, dual_clip=3.0)
    loss, slope, sums = one_token(ratio, advantage, objective=bound)
    assert (loss, slope) == (approx(-objective), approx(-gradient))
    assert sums["clipped"] == (gradient == 0)


def test_dual_clip_equals_finite_differences():
    logprobs_T, entropy_T, terms = batch("token-mean", WEIGHT_N)

    def loss(logprobs_T):
        objective = POLICIES["dual-clip"]
        return policy_loss(logprobs_T, entropy_T, terms, objective=objective, **CLIPS)[0]

    assert_gradients(loss, (logprobs_T,), scale=1.0)


def test_a_dual_clip_beyond_all_ratios_is_the_clipped_loss_bit_for_bit():
    logprobs_T, entropy_T, terms = batch()
    results = [
        policy_loss(logprobs_T, entropy_T, terms, objective=objective, **CLIPS)
        for objective in (clipped, partial(dual_clipped, dual_clip=100.0))
    ]
    losses, sums = zip(*results, strict=True)
    assert torch.equal(*losses) and sums[0] == sums[1]
    assert torch.equal(*(torch.autograd.grad(loss, logprobs_T)[0] for loss in losses))


def test_where_all_ratios_are_beyond_the_dual_clip_there_is_no_gradient():
    logprobs_T = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
    ones_T = torch.ones(3, dtype=torch.float64)
    terms = LossTerms(logprobs_T.detach() - math.log(5), -ones_T, ones_T)
    loss, sums = policy_loss(logprobs_T, ones_T, terms, objective=POLICIES["dual-clip"])
    assert loss.item() == approx(3 * DUAL) and sums["clipped"] == 3
    assert torch.autograd.grad(loss, logprobs_T)[0].eq(0).all()


@pytest.mark.parametrize("bound", [1.0, 0.5, -3.0])
def test_a_dual_clip_must_be_above_1(bound):
    with pytest.raises(ValueError, match=rf"loss\.dual_clip={bound} must be above 1"):
        LossConfig(policy="dual-clip", dual_clip=bound)


# CISPO


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [(4.0, 2.0, 1.28), (4.0, -2.0, 1.28), (0.5, 2.0, 0.8), (0.5, -2.0, 0.8), (1.1, 2.0, 1.1)],
)
def test_cispo_by_hand(ratio, advantage, weight):
    """Probability 0.3 times the ratio; the gradient is the clipped ratio times the advantage."""
    loss, gradient, sums = one_token(ratio, advantage, objective=cispo)
    assert loss == approx(-weight * advantage * math.log(0.3 * ratio))
    assert gradient == approx(-weight * advantage)
    assert sums["clipped"] == (weight != ratio)


def test_cispo_without_a_lower_clip_is_that_of_its_paper_and_of_trl():
    """Both bound the weight from above only."""
    logprobs_T, entropy_T, terms = batch("token-mean", WEIGHT_N)
    loss, sums = policy_loss(
        logprobs_T, entropy_T, terms, objective=cispo, clip_low=1.0, clip_high=HIGH
    )
    ratio_T = (logprobs_T - terms.old_logprobs_T).exp()
    weight_T = ratio_T.clamp(max=1 + HIGH).detach()
    expected = (terms.coefficient_T * -weight_T * terms.advantage_T * logprobs_T).sum()
    assert loss.item() == approx(expected.item())
    assert_close(*(torch.autograd.grad(x, logprobs_T)[0] for x in (loss, expected)))
    assert sums["clipped"] == (ratio_T > 1 + HIGH).sum() and (ratio_T < 1 - HIGH).any()


def test_where_all_weights_are_clipped_each_token_keeps_its_gradient():
    logprobs_T = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
    ones_T = torch.ones(3, dtype=torch.float64)
    terms = LossTerms(logprobs_T.detach() - math.log(5), ones_T, ones_T)
    loss, sums = policy_loss(logprobs_T, ones_T, terms, objective=cispo)
    assert sums["clipped"] == 3
    assert torch.autograd.grad(loss, logprobs_T)[0].tolist() == approx([-1.28] * 3)


def test_only_cispo_can_be_without_a_lower_clip():
    assert LossConfig(policy="cispo", clip_low=1.0).clip_low == 1.0
    for settings in (
        {"policy": "cispo", "clip_low": 1.5},
        {"policy": "dual-clip", "clip_low": 1.0},
    ):
        with pytest.raises(ValueError, match=r"loss\.clip_low=1.* must lie between 0 and 1"):
            LossConfig(**settings)


# GSPO


@pytest.mark.parametrize(
    ("advantage", "objective", "gradient"), [(1.0, 1.28, 0.0), (-1.0, -2.0, -2.0)]
)
def test_gspo_by_hand(advantage, objective, gradient):
    """Ratios 4 and 1: that of the rollout is their geometric mean, 2, for both tokens."""
    old_T = torch.tensor([0.2, 0.5]).double().log()
    logprobs_T = torch.tensor([0.8, 0.5]).double().log().requires_grad_()
    ones_T, two = torch.ones(2, dtype=torch.float64), torch.tensor([2])
    terms = LossTerms(old_T, advantage * ones_T, ones_T / 2)
    of_one = partial(gspo, here_M=two, lengths_M=two)
    loss, sums = policy_loss(logprobs_T, ones_T, terms, objective=of_one)
    assert loss.item() == approx(-objective)
    (gradient_T,) = torch.autograd.grad(loss, logprobs_T)
    assert gradient_T.tolist() == approx([-gradient / 2] * 2)
    assert sums["clipped"] == 2 * (gradient == 0)
    assert sums["ratio"].item() == approx(5.0)


def test_gspo_equals_finite_differences():
    """A token moves the ratio of all tokens of its rollout, each by its share."""
    logprobs_T, entropy_T, terms = batch("seq-mean-token-mean", WEIGHT_N)

    def loss(logprobs_T):
        return policy_loss(logprobs_T, entropy_T, terms, objective=POLICIES["gspo"], **CLIPS)[0]

    assert_gradients(loss, (logprobs_T,), scale=1.0)


def test_rollouts_of_one_token_have_the_clipped_loss_bit_for_bit():
    logprobs_T, entropy_T, terms = batch()
    ones_T = torch.ones(10, dtype=torch.long)
    results = [
        policy_loss(logprobs_T, entropy_T, terms, objective=objective, **CLIPS)
        for objective in (clipped, partial(gspo, here_M=ones_T, lengths_M=ones_T))
    ]
    losses, sums = zip(*results, strict=True)
    assert torch.equal(*losses) and sums[0] == sums[1]
    assert torch.equal(*(torch.autograd.grad(loss, logprobs_T)[0] for loss in losses))


def test_a_rollout_is_clipped_as_a_whole():
    """All rollouts are far beyond the clip: none has a gradient, whatever its single ratios."""
    logprobs_T, entropy_T, terms = batch()
    farther_T = torch.where(terms.advantage_T > 0, -2.0, 2.0)
    terms = LossTerms(terms.old_logprobs_T + farther_T, terms.advantage_T, terms.coefficient_T)
    loss, sums = policy_loss(logprobs_T, entropy_T, terms, objective=POLICIES["gspo"], **CLIPS)
    assert torch.autograd.grad(loss, logprobs_T)[0].eq(0).all()
    assert sums["clipped"] == (terms.advantage_T != 0).sum()


def test_gspo_needs_a_head_that_has_complete_rollouts():
    with pytest.raises(ValueError, match=r"loss\.policy=gspo .* set loss\.head=recompute"):
        LossConfig(policy="gspo")
    assert LossConfig(policy="gspo", head="recompute").policy == "gspo"


# Dr. GRPO


def test_dr_grpo_is_the_formula_of_trl():
    """Rewards less their group's mean; the sum over tokens by rollouts times the longest possible.

    Four rollouts of one prompt, and at most 6 tokens.
    """
    rewards_N = torch.tensor([1.0, 0.0, 0.0, 1.0])
    advantage_N = group_advantages(rewards_N[None], std="none")[0]
    assert advantage_N.tolist() == [0.5, -0.5, -0.5, 0.5]
    ones_N, name = torch.ones(4).double(), "seq-mean-token-sum-norm"
    coefficient_N = rollout_coefficients(ones_N, LENGTHS_N, name, max_tokens=6)
    logprobs_T, entropy_T, terms = batch()
    terms = LossTerms(terms.old_logprobs_T, per_token(advantage_N), per_token(coefficient_N))
    loss, _ = policy_loss(logprobs_T, entropy_T, terms, **CLIPS)
    ratio_NS = padded((logprobs_T - terms.old_logprobs_T).exp())
    gain_NS = torch.minimum(
        ratio_NS * advantage_N[:, None], ratio_NS.clamp(1 - LOW, 1 + HIGH) * advantage_N[:, None]
    )
    expected = -(gain_NS * padded(torch.ones(10))).sum() / (4 * 6)
    assert loss.item() == approx(expected.item())
    assert_close(*(torch.autograd.grad(x, logprobs_T)[0] for x in (loss, expected)))


# Tokens


@pytest.mark.parametrize("policy", POLICIES)
def test_no_token_gives_a_loss_of_zero_that_has_a_gradient(policy):
    empty_T, logprobs_T = torch.empty(0), torch.empty(0, requires_grad=True)
    terms, objective = LossTerms(empty_T, empty_T, empty_T), POLICIES[policy]
    if policy == "gspo":
        objective = partial(gspo, here_M=empty_T.long(), lengths_M=empty_T.long())
    loss, sums = policy_loss(logprobs_T, empty_T, terms, objective=objective)
    assert loss.item() == 0 and sums["clipped"] == 0
    assert torch.autograd.grad(loss, logprobs_T)[0].shape == (0,)
