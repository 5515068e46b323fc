"""Relative-entropy weights: the identities and sensitivities of arXiv 2511.00794, appendix E."""

import pytest
import torch
from rounding import DIFFERENCE, STEP, approx, assert_close

from megatron_prepo.prepo.entropy_weights import relative_entropy_weights

LENGTHS_N = torch.tensor([3, 10, 1, 6, 25])
ENTROPY_N = torch.tensor([0.2, 1.1, 2.5, 0.05, 0.7], dtype=torch.float64)


def test_by_hand():
    """Entropies 1, 3 of lengths 3, 1: means 2 of sequences, (3*1 + 1*3)/4 = 1.5 of tokens."""
    entropy_N, lengths_N = torch.tensor([1.0, 3.0]), torch.tensor([3, 1])
    assert relative_entropy_weights(entropy_N, lengths_N).tolist() == [0.5, 1.5]
    by_token_N = relative_entropy_weights(entropy_N, lengths_N, mean="token")
    assert by_token_N.tolist() == approx([1 / 1.5, 2.0])


def test_sequence_mean_gives_weights_of_mean_one():
    assert relative_entropy_weights(ENTROPY_N, LENGTHS_N).mean().item() == approx(1)


def test_token_mean_keeps_the_number_of_tokens():
    """sum |o| w = sum |o|, and so mean(w) = 1 - Cov(|o|, w) / mean|o|, which is not 1."""
    weight_N = relative_entropy_weights(ENTROPY_N, LENGTHS_N, mean="token")
    lengths_N = LENGTHS_N.double()
    assert (lengths_N * weight_N).sum().item() == approx(45)
    covariance = (lengths_N * weight_N).mean() - lengths_N.mean() * weight_N.mean()
    expected = 1 - covariance / lengths_N.mean()
    assert weight_N.mean().item() == approx(expected.item())
    assert abs(weight_N.mean().item() - 1) > 0.1


@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_only_relative_entropy_matters(mean):
    for factor in (1e-6, 0.5, 1e6):
        assert_close(
            relative_entropy_weights(factor * ENTROPY_N, LENGTHS_N, mean=mean),
            relative_entropy_weights(ENTROPY_N, LENGTHS_N, mean=mean),
        )


@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_equal_lengths_make_both_means_one(mean):
    weight_N = relative_entropy_weights(ENTROPY_N, torch.full((5,), 4), mean=mean)
    assert_close(weight_N, ENTROPY_N / ENTROPY_N.mean())


@pytest.mark.parametrize("mean", ["sequence", "token"])
@pytest.mark.parametrize("entropy", [0.1, 1.0, 0.3337, 1e-9, 11.9])
def test_equal_entropies_give_exactly_ones(mean, entropy):
    """PREPO is then GRPO.  Sums of equal float32 numbers are exact in float64; means that were
    taken in float64 may be off by its last bit, which the loss, in float32, does not see.
    """
    entropy_N = torch.full((5,), entropy)
    assert relative_entropy_weights(entropy_N, LENGTHS_N, mean=mean).tolist() == [1.0] * 5
    entropy_N = torch.full((5,), entropy, dtype=torch.float64)
    weight_N = relative_entropy_weights(entropy_N, LENGTHS_N, mean=mean)
    assert weight_N.float().tolist() == [1.0] * 5


@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_all_zero_entropies_give_ones(mean):
    """A deterministic policy; denormal numbers are as good as zero."""
    assert relative_entropy_weights(torch.zeros(5), LENGTHS_N, mean=mean).tolist() == [1.0] * 5
    tiny_N = 1e-42 * torch.arange(5)
    assert relative_entropy_weights(tiny_N, LENGTHS_N, mean=mean).tolist() == [1.0] * 5


def test_one_zero_entropy_gives_one_zero_weight():
    weight_N = relative_entropy_weights(torch.tensor([0.0, 2.0]), torch.tensor([4, 4]))
    assert weight_N.tolist() == [0.0, 2.0]


def test_token_mean_is_bounded_by_the_share_of_tokens():
    """0 <= w_i <= sum |o| / |o_i|, reached where one rollout owns all the entropy."""
    generator = torch.Generator().manual_seed(0)
    bound_N = LENGTHS_N.sum() / LENGTHS_N
    for _ in range(50):
        entropy_N = torch.rand(5, generator=generator) ** 4
        weight_N = relative_entropy_weights(entropy_N, LENGTHS_N, mean="token")
        assert (weight_N >= 0).all() and (weight_N <= bound_N).all()
    alone_N = relative_entropy_weights(torch.tensor([0.0, 0, 1, 0, 0]), LENGTHS_N, mean="token")
    assert alone_N[2].item() == approx(bound_N[2].item())


@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_sensitivities_of_appendix_e(mean):
    """dw_i/dH_j = delta_ij / Hbar - (H_i / Hbar^2) share_j, by central differences.

    share_j is |o_j| / sum |o| for the token mean, 1/N for the sequence mean.  Self-sensitivity is
    positive: it vanishes only for a rollout that owns all the entropy.
    """
    lengths_N = LENGTHS_N.double()
    share_N = lengths_N / lengths_N.sum() if mean == "token" else torch.ones(5).double() / 5
    batch = (share_N * ENTROPY_N).sum()
    expected_NN = torch.eye(5).double() / batch - ENTROPY_N[:, None] * share_N / batch**2
    columns = []
    for j in range(5):
        change_N = torch.zeros(5).double()
        change_N[j] = STEP
        up_N = relative_entropy_weights(ENTROPY_N + change_N, LENGTHS_N, mean=mean)
        down_N = relative_entropy_weights(ENTROPY_N - change_N, LENGTHS_N, mean=mean)
        columns.append((up_N - down_N) / (2 * STEP))
    measured_NN = torch.stack(columns, dim=1)
    largest = relative_entropy_weights(ENTROPY_N, LENGTHS_N, mean=mean).max().item()
    torch.testing.assert_close(measured_NN, expected_NN, rtol=0, atol=DIFFERENCE * largest)
    assert (measured_NN.diagonal() > 0).all()
    assert (measured_NN - measured_NN.diagonal().diag() <= 0).all()


def test_weights_are_constants():
    entropy_N = ENTROPY_N.clone().requires_grad_()
    assert not relative_entropy_weights(entropy_N, LENGTHS_N).requires_grad


def test_clamp_keeps_weights_within_its_bounds():
    """Weights 0.22, 1.2, 2.7, 0.05, 0.77: those outside [1/2, 2] are clamped, the rest
    unchanged."""
    free_N = relative_entropy_weights(ENTROPY_N, LENGTHS_N)
    clamped_N = relative_entropy_weights(ENTROPY_N, LENGTHS_N, clamp=2.0)
    assert clamped_N[[0, 2, 3]].tolist() == [0.5, 2.0, 0.5]
    assert torch.equal(clamped_N[[1, 4]], free_N[[1, 4]])


@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_rollouts_left_out_of_the_mean_still_get_a_weight(mean):
    counts_N = torch.tensor([True, False, True, False, True])
    weight_N = relative_entropy_weights(ENTROPY_N, LENGTHS_N, mean=mean, counts_N=counts_N)
    counted_N = relative_entropy_weights(ENTROPY_N[counts_N], LENGTHS_N[counts_N], mean=mean)
    assert_close(weight_N[counts_N], counted_N)
    batch = ENTROPY_N[counts_N][0] / counted_N[0]
    assert_close(weight_N[~counts_N], ENTROPY_N[~counts_N] / batch)


def test_no_rollout_in_the_mean_gives_ones():
    nobody_N = torch.zeros(5, dtype=torch.bool)
    assert relative_entropy_weights(ENTROPY_N, LENGTHS_N, counts_N=nobody_N).tolist() == [1.0] * 5
