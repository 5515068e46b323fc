"""The policy loss: closed forms, gradients by hand, and where clipping takes them away."""

import math

import pytest
import torch
from rounding import approx, assert_close, assert_gradients

from megatron_prepo.prepo.entropy_weights import relative_entropy_weights
from megatron_prepo.prepo.loss import (
    LossTerms,
    k3,
    policy_loss,
    rollout_coefficients,
)

LENGTHS_N = torch.tensor([3, 1, 4, 2])
ADVANTAGE_N = torch.tensor([1.5, -0.5, 0.0, -1.0], dtype=torch.float64)
AGGREGATIONS = ["seq-mean-token-sum", "seq-mean-token-mean", "token-mean"]


def per_token(values_N):
    return values_N.repeat_interleave(LENGTHS_N)


def batch(aggregation="seq-mean-token-sum", weight_N=None, seed=0, **optional):
    """Return random log-probabilities and entropies of 4 rollouts, and their terms, in float64."""
    generator = torch.Generator().manual_seed(seed)
    logprobs_T, noise_T, entropy_T = torch.rand(3, 10, generator=generator, dtype=torch.float64)
    logprobs_T = -3 * logprobs_T
    weight_N = torch.ones(4, dtype=torch.float64) if weight_N is None else weight_N
    coefficient_N = rollout_coefficients(weight_N, LENGTHS_N, aggregation)
    terms = LossTerms(
        old_logprobs_T=logprobs_T + 0.8 * (noise_T - 0.5),
        advantage_T=per_token(ADVANTAGE_N),
        coefficient_T=per_token(coefficient_N),
        **optional,
    )
    return logprobs_T.requires_grad_(), entropy_T.requires_grad_(), terms


def one_token(ratio, advantage, **settings):
    """Return the loss, its gradient by the log-probability, and the sums, at coefficient 1."""
    logprobs_T = torch.tensor([math.log(0.3 * ratio)], dtype=torch.float64, requires_grad=True)
    terms = LossTerms(
        old_logprobs_T=torch.tensor([math.log(0.3)], dtype=torch.float64),
        advantage_T=torch.tensor([advantage], dtype=torch.float64),
        coefficient_T=torch.ones(1, dtype=torch.float64),
    )
    loss, sums = policy_loss(logprobs_T, torch.zeros(1), terms, **settings)
    (gradient,) = torch.autograd.grad(loss, logprobs_T)
    return loss.item(), gradient.item(), sums


# Aggregation


def test_aggregations_in_closed_form():
    """Two rollouts of 1 and 3 tokens with weights 2 and 1, ratio 1, advantages 1 and -1."""
    weight_N, lengths_N = torch.tensor([2.0, 1.0]), torch.tensor([1, 3])
    coefficients = [rollout_coefficients(weight_N, lengths_N, a).tolist() for a in AGGREGATIONS]
    assert coefficients == [[1.0, 0.5], [1.0, approx(1 / 6, dtype=torch.float32)], [0.5, 0.25]]
    # -(sum over tokens of c A): the second rollout counts three times
    losses = []
    for c_1, c_2 in coefficients:
        terms = LossTerms(
            old_logprobs_T=torch.full((4,), -1.0),
            advantage_T=torch.tensor([1.0, -1, -1, -1]),
            coefficient_T=torch.tensor([c_1, c_2, c_2, c_2]),
        )
        losses.append(policy_loss(torch.full((4,), -1.0), torch.zeros(4), terms)[0].item())
    assert losses == approx([0.5, -0.5, 0.25], dtype=torch.float32)


def test_dr_grpo_divides_by_a_constant():
    """Two rollouts of weights 2 and 1, at most 5 tokens: 2 / 10 and 1 / 10."""
    weight_N, lengths_N = torch.tensor([2.0, 1.0]).double(), torch.tensor([1, 3])
    name = "seq-mean-token-sum-norm"
    coefficient_N = rollout_coefficients(weight_N, lengths_N, name, max_tokens=5)
    assert coefficient_N.tolist() == approx([0.2, 0.1])
    plain_N = rollout_coefficients(weight_N, lengths_N, "seq-mean-token-sum")
    assert_close(5 * coefficient_N, plain_N)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_ratio_one_and_equal_weights_give_minus_the_mean_advantage(aggregation):
    """The mean is over rollouts (times their length for token sums), or over tokens."""
    logprobs_T, entropy_T, terms = batch(aggregation)
    terms = LossTerms(logprobs_T.detach(), terms.advantage_T, terms.coefficient_T)
    loss, _ = policy_loss(logprobs_T, entropy_T, terms)
    expected = {
        "seq-mean-token-sum": (LENGTHS_N * ADVANTAGE_N).mean(),
        "seq-mean-token-mean": ADVANTAGE_N.mean(),
        "token-mean": (LENGTHS_N * ADVANTAGE_N).sum() / LENGTHS_N.sum(),
    }
    assert loss.item() == approx(-expected[aggregation].item())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_losses_of_a_split_batch_add_up(aggregation):
    """Loss, sums and gradients are those of the complete batch, for any split."""
    weight_N = torch.tensor([0.5, 2.0, 1.0, 0.7], dtype=torch.float64)
    optional = {
        "importance_T": torch.linspace(0.5, 2, 10).double(),
        "reference_logprobs_T": torch.linspace(-2, 0, 10).double(),
    }
    logprobs_T, entropy_T, terms = batch(aggregation, weight_N, **optional)
    settings = {"entropy_coef": 0.1, "kl_coef": 0.2}
    whole, whole_sums = policy_loss(logprobs_T, entropy_T, terms, **settings)
    for cuts in ([3, 7], [1, 1, 8], [10, 0]):
        parts = [
            policy_loss(lp, ent, LossTerms(*fields), **settings)
            for lp, ent, *fields in zip(
                logprobs_T.split(cuts),
                entropy_T.split(cuts),
                *(value.split(cuts) for value in vars(terms).values()),
                strict=True,
            )
        ]
        together = sum(loss for loss, _ in parts)
        assert together.item() == approx(whole.item())
        for name, value in whole_sums.items():
            total = sum(sums[name] for _, sums in parts)
            assert total.item() == approx(value.item())
        assert_close(
            torch.autograd.grad(together, (logprobs_T, entropy_T)),
            torch.autograd.grad(whole, (logprobs_T, entropy_T), retain_graph=True),
        )


# Weights


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_equal_entropies_are_grpo_exactly(aggregation, mean):
    """Loss and gradient equal those without weights, bit for bit."""
    weight_N = relative_entropy_weights(torch.full((4,), 0.37), LENGTHS_N, mean=mean)
    losses, gradients = [], []
    for weights in (weight_N, torch.ones(4, dtype=torch.float64)):
        logprobs_T, entropy_T, terms = batch(aggregation, weights)
        loss, _ = policy_loss(logprobs_T, entropy_T, terms)
        losses.append(loss)
        gradients += torch.autograd.grad(loss, logprobs_T)
    assert torch.equal(*losses) and torch.equal(*gradients)


def test_a_weight_scales_the_gradient_of_its_rollout_and_of_no_other():
    weight_N = torch.tensor([2.0, 0.5, 3.0, 0.0], dtype=torch.float64)
    gradients = []
    for weights in (weight_N, None):
        logprobs_T, entropy_T, terms = batch(weight_N=weights)
        gradients += torch.autograd.grad(policy_loss(logprobs_T, entropy_T, terms)[0], logprobs_T)
    assert_close(gradients[0], per_token(weight_N) * gradients[1])


def test_weights_are_constants_of_the_loss():
    """Weights computed from the logits being trained give the gradient of fixed weights."""
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(10, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens_T = torch.randint(0, 6, (10,), generator=generator)

    def gradient(weights):
        logp_TV = logits_TV.log_softmax(-1)
        entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
        entropy_N = torch.stack([part.mean() for part in entropy_T.split(LENGTHS_N.tolist())])
        weight_N = weights(entropy_N)
        logprobs_T = logp_TV.gather(1, tokens_T[:, None])[:, 0]
        coefficient_N = rollout_coefficients(weight_N, LENGTHS_N, "seq-mean-token-sum")
        terms = LossTerms(
            logprobs_T.detach() - 0.05, per_token(ADVANTAGE_N), per_token(coefficient_N)
        )
        loss, _ = policy_loss(logprobs_T, entropy_T, terms)
        return torch.autograd.grad(loss, logits_TV)[0]

    ours = gradient(lambda entropy_N: relative_entropy_weights(entropy_N, LENGTHS_N))
    constant = gradient(lambda entropy_N: (entropy_N / entropy_N.mean()).detach())
    through = gradient(lambda entropy_N: entropy_N / entropy_N.mean())
    assert_close(ours, constant)
    assert (ours - through).abs().max() > 1e-3  # so that the test could fail


# Gradients and clipping


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_on_policy_gradient_by_hand(aggregation):
    """The gradient at ratio 1 is - sum_t c A grad logp, the policy gradient."""
    weight_N = torch.tensor([0.5, 2.0, 1.0, 0.7], dtype=torch.float64)
    logprobs_T, entropy_T, terms = batch(aggregation, weight_N)
    terms = LossTerms(logprobs_T.detach(), terms.advantage_T, terms.coefficient_T)
    loss, sums = policy_loss(logprobs_T, entropy_T, terms)
    gradient_T, entropy_gradient_T = torch.autograd.grad(
        loss, (logprobs_T, entropy_T), allow_unused=True
    )
    assert_close(gradient_T, -terms.coefficient_T * terms.advantage_T)
    assert entropy_gradient_T is None
    assert sums["clipped"] == 0 and sums["kl"] == 0 and sums["ratio"] == 10


CLIPPED = [(1.5, 1.0), (0.5, -1.0)]
NOT_CLIPPED = [(0.5, 1.0), (1.5, -1.0), (1.25, 1.0), (0.85, -1.0), (1.0, 1.0), (1.0, -1.0)]


@pytest.mark.parametrize(("ratio", "advantage"), CLIPPED)
def test_clipping_kills_the_gradient_where_the_ratio_has_gone_far_enough(ratio, advantage):
    """A good token already made likelier than 1.28, a bad one already below 0.8."""
    loss, gradient, sums = one_token(ratio, advantage)
    assert gradient == 0
    assert loss == approx(-(1.28 if advantage > 0 else 0.8) * advantage)
    assert sums["clipped"] == 1


@pytest.mark.parametrize(("ratio", "advantage"), NOT_CLIPPED)
def test_clipping_leaves_the_gradient_everywhere_else(ratio, advantage):
    """It remains within the clip, and beyond it where min selects the unclipped objective."""
    loss, gradient, sums = one_token(ratio, advantage)
    assert loss == approx(-ratio * advantage)
    assert gradient == approx(-ratio * advantage)
    assert sums["clipped"] == 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_two_clips_are_settings_of_their_own(advantage):
    """Lower and upper clip differ: 1.25 is beyond 1 + 0.2, 0.85 within 1 - 0.2 but beyond 1 -
    0.1."""
    ratio = 1.25 if advantage > 0 else 0.85
    assert one_token(ratio, advantage)[1] != 0
    assert one_token(ratio, advantage, clip_low=0.1, clip_high=0.2)[1] == 0


def test_loss_and_gradient_equal_the_formula_by_finite_differences():
    """All terms are included; random ratios lie within and beyond the clips."""
    weight_N = torch.tensor([0.5, 2.0, 1.0, 0.7], dtype=torch.float64)
    optional = {
        "importance_T": torch.linspace(0.5, 2, 10).double(),
        "reference_logprobs_T": torch.linspace(-2, 0, 10).double(),
    }
    logprobs_T, entropy_T, terms = batch("token-mean", weight_N, **optional)
    settings = {"clip_low": 0.1, "clip_high": 0.15, "entropy_coef": 0.1, "kl_coef": 0.2}

    def by_hand(logprobs_T, entropy_T):
        total = 0.0
        for t in range(10):
            ratio, advantage = (
                math.exp(logprobs_T[t] - terms.old_logprobs_T[t]),
                terms.advantage_T[t],
            )
            clipped = min(max(ratio, 0.9), 1.15)
            objective = min(ratio * advantage, clipped * advantage) * terms.importance_T[t]
            log_ratio = terms.reference_logprobs_T[t] - logprobs_T[t]
            kl = math.exp(log_ratio) - log_ratio - 1
            objective = objective + 0.1 * entropy_T[t] - 0.2 * kl
            total -= terms.coefficient_T[t] * objective
        return total

    loss, sums = policy_loss(logprobs_T, entropy_T, terms, **settings)
    expected = by_hand(logprobs_T.detach(), entropy_T.detach())
    assert loss.item() == approx(expected.item())
    assert 0 < sums["clipped"] < 10
    assert_gradients(
        lambda a, b: policy_loss(a, b, terms, **settings)[0], (logprobs_T, entropy_T), scale=1.0
    )


def test_an_advantage_of_zero_contributes_nothing_whatever_the_weight():
    weight_N = torch.tensor([1.0, 1.0, 1e6, 1.0], dtype=torch.float64)
    logprobs_T, entropy_T, terms = batch(weight_N=weight_N)
    assert (terms.advantage_T == 0).sum() == 4
    loss, _ = policy_loss(logprobs_T, entropy_T, terms)
    (gradient_T,) = torch.autograd.grad(loss, logprobs_T)
    assert gradient_T[terms.advantage_T == 0].eq(0).all()
    assert loss.item() == approx(policy_loss(*batch())[0].item())


def test_no_token_gives_a_loss_of_zero_that_has_a_gradient():
    """The empty micro-batch of a rank without rollouts."""
    empty = torch.empty(0)
    logprobs_T = torch.empty(0, requires_grad=True)
    loss, sums = policy_loss(logprobs_T, empty, LossTerms(empty, empty, empty))
    assert loss.item() == 0 and sums["tokens"] == 0
    assert torch.autograd.grad(loss, logprobs_T)[0].shape == (0,)


# Further terms


def test_entropy_bonus_rewards_entropy():
    logprobs_T, entropy_T, terms = batch()
    loss, _ = policy_loss(logprobs_T, entropy_T, terms, entropy_coef=0.3)
    without, _ = policy_loss(logprobs_T, entropy_T, terms)
    bonus = 0.3 * (terms.coefficient_T * entropy_T).sum()
    assert (without - loss).item() == approx(bonus.item())
    (gradient_T,) = torch.autograd.grad(loss, entropy_T)
    assert_close(gradient_T, -0.3 * terms.coefficient_T)


def test_importance_multiplies_the_objective_but_not_bonus_and_penalty():
    reference = {"reference_logprobs_T": torch.linspace(-2, 0, 10).double()}
    importance_T = torch.linspace(0.5, 2, 10).double()
    settings = {"entropy_coef": 0.1, "kl_coef": 0.2}
    gradients = []
    for importance in (importance_T, None):
        for settings_or_none in (settings, {}):
            logprobs_T, entropy_T, terms = batch(importance_T=importance, **reference)
            loss, _ = policy_loss(logprobs_T, entropy_T, terms, **settings_or_none)
            gradients += torch.autograd.grad(loss, logprobs_T)
    with_all, with_only, without_but, without = gradients
    assert_close(with_only, importance_T * without)
    assert_close(with_all - with_only, without_but - without)


# Kullback-Leibler


def test_k3_is_zero_at_equality_and_positive_elsewhere():
    log_ratio_T = torch.cat([-torch.logspace(-12, 1, 200), torch.logspace(-12, 1, 200)])
    for dtype in (torch.float32, torch.float64):
        assert (k3(log_ratio_T.to(dtype)) >= 0).all()
    assert k3(torch.zeros(1)).item() == 0
    assert (k3(log_ratio_T.double()[log_ratio_T.abs() > 1e-6]) > 0).all()


def test_k3_is_exact_in_expectation():
    """Sum over all tokens of p k3(log p - log q) = KL(p || q)."""
    p_V = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    q_V = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    estimate = (p_V * k3(p_V.log() - q_V.log())).sum()
    assert estimate.item() == approx((p_V * (p_V / q_V).log()).sum().item())


def test_kl_penalty_in_closed_form():
    """Probability 0.4 now, 0.2 at first: k3 = 1/2 + ln 2 - 1, with gradient 1 - 1/2."""
    logprobs_T = torch.tensor([0.4]).double().log().requires_grad_()
    ones = torch.ones(1, dtype=torch.float64)
    terms = LossTerms(logprobs_T.detach(), 0 * ones, ones, None, torch.tensor([0.2]).double().log())
    loss, sums = policy_loss(logprobs_T, 0 * ones, terms, kl_coef=0.5)
    assert loss.item() == approx(0.5 * (math.log(2) - 0.5))
    assert sums["reference_kl"].item() == approx(math.log(2) - 0.5)
    assert torch.autograd.grad(loss, logprobs_T)[0].item() == approx(0.25)


def test_a_penalty_that_is_in_the_reward_is_measured_and_not_in_the_loss():
    reference = {"reference_logprobs_T": torch.linspace(-2, 0, 10).double()}
    losses, found = zip(
        *(policy_loss(*batch(**optional)) for optional in (reference, {})), strict=True
    )
    assert torch.equal(*losses)
    logprobs_T, *_ = batch()
    kl_T = k3(logprobs_T - reference["reference_logprobs_T"])
    assert found[0]["reference_kl"].item() == approx(kl_T.sum().item())
    assert "reference_kl" not in found[1]


def test_kl_to_the_old_policy_is_exact_in_expectation():
    """Tokens are sampled from the old policy: their mean estimates KL(old || new).

    Old probabilities (1/2, 1/4, 1/4), so that the tokens 0, 0, 1, 2 have this distribution.
    """
    old_V = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    new_V = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    tokens_T = torch.tensor([0, 0, 1, 2])
    zeros_T = torch.zeros(4).double()
    terms = LossTerms(old_V.log()[tokens_T], zeros_T, zeros_T)
    _, sums = policy_loss(new_V.log()[tokens_T], zeros_T, terms)
    expected = (old_V * (old_V / new_V).log()).sum()
    assert sums["kl"].item() / 4 == approx(expected.item())


def test_sums_over_tokens_by_hand():
    """Ratios 2, 1, 1/2 with advantages 1, 1, -1: both ends are clipped."""
    logprobs_T = torch.tensor([0.4, 0.2, 0.1]).double().log()
    terms = LossTerms(
        torch.full((3,), 0.2).double().log(), torch.tensor([1.0, 1, -1]).double(), torch.ones(3)
    )
    _, sums = policy_loss(logprobs_T, torch.zeros(3), terms)
    assert sums["tokens"].item() == 3 and sums["clipped"].item() == 2
    assert sums["ratio"].item() == approx(3.5)
    assert not any(value.requires_grad for value in sums.values())
