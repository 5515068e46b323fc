"""Importance weights and mismatch metrics: by hand, in expectation, and in the gradient."""

import itertools
import math

import pytest
import torch
from rounding import approx, assert_close

from megatron_prepo.config import LossConfig
from megatron_prepo.prepo.importance import (
    importance_weights,
    masked,
    sequence_ratios,
    token_ratios,
    truncated,
)
from megatron_prepo.prepo.loss import LossTerms, policy_loss
from megatron_prepo.prepo.statistics import effective_share, nearest_rank
from megatron_prepo.trainer.mismatch_metrics import importance_metrics, mismatch_metrics

OLD_T = torch.tensor([0.1, 0.2, 0.4, 0.8]).log()
ENGINE_T = torch.tensor([0.2, 0.2, 0.2, 0.1]).log()
"""Ratios 1/2, 1, 2 and 8; their product is 8."""


def importance(settings, old_logprobs_T, engine_logprobs_T):
    """Return the weights for the settings of the section `loss`."""
    return importance_weights(
        old_logprobs_T,
        engine_logprobs_T,
        method=settings.importance,
        level=settings.importance_level,
        low=settings.importance_low,
        high=settings.importance_high,
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"importance": "truncated"}, [0.5, 1.0, 2.0, 2.0]),
        ({"importance": "truncated", "importance_high": 1.0}, [0.5, 1.0, 1.0, 1.0]),
        ({"importance": "masked", "importance_high": 2.1}, [0.0, 1.0, 2.0, 0.0]),
        ({"importance": "masked", "importance_low": 0.4, "importance_high": 9.0}, [0.5, 1, 2, 8]),
        ({"importance": "truncated", "importance_level": "sequence"}, [2.0] * 4),
        ({"importance": "masked", "importance_level": "sequence"}, [0.0] * 4),
        (
            {"importance": "masked", "importance_level": "sequence", "importance_high": 9.0},
            [8.0] * 4,
        ),
    ],
)
def test_by_hand(settings, expected):
    """The default band is [1/2, 2]; 1/2 as a quotient of rounded logarithms is just below it."""
    old_T = OLD_T - torch.tensor([1e-6, 0, 0, 0])
    importance_T = importance(LossConfig(**settings), old_T, ENGINE_T)
    assert importance_T.tolist() == approx(expected, dtype=torch.float32)
    assert importance_T.dtype == torch.float32


def test_the_bands_ends_are_inside():
    assert masked(torch.tensor([0.5, 2.0]), 0.5, 2.0).tolist() == [0.5, 2.0]


def test_a_ratio_beyond_all_numbers_counts_the_cap_or_nothing():
    """The product of a long rollout overflows: the result is neither inf nor, times 0, NaN."""
    ratio_T = sequence_ratios(torch.zeros(1000), torch.full((1000,), -10.0))
    assert ratio_T.eq(math.inf).all()
    assert truncated(ratio_T, 2.0).eq(2).all() and masked(ratio_T, 0.5, 2.0).eq(0).all()


def test_where_engine_and_actor_agree_nothing_changes():
    for method, level in itertools.product(["truncated", "masked"], ["token", "sequence"]):
        settings = LossConfig(importance=method, importance_level=level)
        assert importance(settings, OLD_T, OLD_T).tolist() == [1.0] * 4


def test_the_sequences_ratio_is_exact_and_the_tokens_is_not():
    """Two tokens of a Markov chain: E_engine[r f] = E_actor[f] for any f of the complete text."""
    generator = torch.Generator().manual_seed(0)
    actor_VV, engine_VV = torch.rand(2, 3, 3, generator=generator, dtype=torch.float64)
    actor_VV, engine_VV = actor_VV / actor_VV.sum(-1, True), engine_VV / engine_VV.sum(-1, True)
    value_VV = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    truth = by_sequence = by_token = 0.0
    for a, b in itertools.product(range(3), range(3)):
        old_T = torch.stack([actor_VV[0, a], actor_VV[a, b]]).log()
        engine_T = torch.stack([engine_VV[0, a], engine_VV[a, b]]).log()
        truth += old_T.sum().exp() * value_VV[a, b]
        p_engine = engine_T.sum().exp()
        by_sequence += p_engine * sequence_ratios(old_T, engine_T)[1] * value_VV[a, b]
        by_token += p_engine * token_ratios(old_T, engine_T)[1] * value_VV[a, b]
    assert by_sequence.item() == approx(truth.item())
    assert abs(by_token - truth) > 1e-3


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradient_of_a_masked_token_is_zero_and_of_others_unchanged_but_for_the_ratio(level):
    """No normaliser changes: masked tokens add nothing, and do not affect other tokens."""
    lengths = [4, 4]
    old_N = [OLD_T.double(), OLD_T.double()]
    engine_N = [ENGINE_T.double(), OLD_T.double()]
    band = {"importance_low": 0.4, "importance_high": 3.0}
    settings = LossConfig(importance="masked", importance_level=level, **band)
    importance_T = torch.cat(
        [importance(settings, old, engine) for old, engine in zip(old_N, engine_N, strict=True)]
    )
    gradients = []
    for weights_T in (importance_T.double(), None):
        logprobs_T = (torch.cat(old_N) + 0.05).requires_grad_()
        terms = LossTerms(
            torch.cat(old_N),
            torch.tensor([1.0, -0.5]).double().repeat_interleave(torch.tensor(lengths)),
            torch.full((8,), 0.5).double(),
            importance_T=weights_T,
        )
        loss, sums = policy_loss(logprobs_T, torch.zeros(8), terms)
        assert sums["tokens"] == 8
        gradients += torch.autograd.grad(loss, logprobs_T)
    assert_close(gradients[0], importance_T.double() * gradients[1])
    outside = [3] if level == "token" else [0, 1, 2, 3]
    assert gradients[0].eq(0).nonzero().flatten().tolist() == outside


def test_metrics_by_hand():
    """Two rollouts: differences ln 2, 0, -ln 2, -ln 8 of actor to engine, and one without any."""
    metrics = mismatch_metrics([OLD_T, OLD_T], [ENGINE_T, OLD_T])
    log2 = math.log(2)
    assert metrics["mismatch/logprob_abs/mean"] == approx(5 * log2 / 8, dtype=torch.float32)
    assert metrics["mismatch/logprob_abs/max"] == approx(3 * log2, dtype=torch.float32)
    assert metrics["mismatch/logprob_abs/q50"] == 0
    assert metrics["mismatch/logprob_abs/q90"] == metrics["mismatch/logprob_abs/max"]
    shares = [metrics[f"mismatch/share_off_by_{x}"] for x in ("0.01", "0.1", "1")]
    assert shares == [3 / 8, 3 / 8, 1 / 8]
    ratios = [0.5, 1, 2, 8, 1, 1, 1, 1]
    ess = sum(ratios) ** 2 / (8 * sum(r * r for r in ratios))
    assert metrics["mismatch/token_ess"] == approx(ess, dtype=torch.float32)
    assert metrics["mismatch/sequence_ess"] == approx(81 / (2 * 65), dtype=torch.float32)
    assert metrics["mismatch/sequence_log_ratio/max"] == approx(3 * log2, dtype=torch.float32)
    assert metrics["mismatch/sequence_log_ratio/min"] == 0
    kl = sum(r + math.log(1 / r) - 1 for r in ratios) / 8
    assert metrics["mismatch/kl"] == approx(kl, dtype=torch.float32)


def test_shares_that_were_truncated_and_left_out():
    cut = LossConfig(importance="truncated", importance_high=3.0)
    band = LossConfig(importance="masked", importance_low=0.7, importance_high=3.0)
    cut_metrics = importance_metrics(cut, importance(cut, OLD_T, ENGINE_T))
    band_metrics = importance_metrics(band, importance(band, OLD_T, ENGINE_T))
    assert cut_metrics["importance/truncated_share"] == 1 / 4
    assert cut_metrics["importance/mean"] == approx((0.5 + 1 + 2 + 3) / 4, dtype=torch.float32)
    assert band_metrics["importance/masked_share"] == 2 / 4
    assert band_metrics["importance/mean"] == approx(3 / 4, dtype=torch.float32)


def test_effective_share_of_ratios_that_overflow():
    assert effective_share(torch.tensor([1000.0, 1000.0, 0.0, 0.0])) == 0.5
    assert effective_share(torch.tensor([-2.0, -2.0])) == 1.0


def test_nearest_rank():
    values_T = torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert [nearest_rank(values_T, q) for q in (0.1, 0.5, 0.51, 1.0)] == [1, 2, 3, 4]
