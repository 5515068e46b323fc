"""Group-relative advantages: the mean is taken off, the standard deviation divided out."""

import math

import pytest
import torch
from rounding import approx, assert_close

from megatron_prepo.prepo.advantages import (
    batch_advantages,
    group_advantages,
    leave_one_out_advantages,
    penalised_rewards,
    token_advantages,
    zero_variance,
)


@pytest.mark.parametrize(
    ("std", "divisor"), [("unbiased", 0.5), ("population", math.sqrt(3) / 4), ("none", 1.0)]
)
def test_by_hand(std, divisor):
    """Rewards 1, 0, 0, 0: mean 1/4, squared deviations 3/4 over n - 1 = 3 or n = 4."""
    advantages_KG = group_advantages(torch.tensor([[1.0, 0, 0, 0]]), std=std, eps=0.0)
    expected = [0.75 / divisor, *[-0.25 / divisor] * 3]
    assert advantages_KG[0].tolist() == approx(expected)


def test_eps_is_added_to_the_standard_deviation():
    (advantages_G,) = group_advantages(torch.tensor([[1.0, -1.0]]), std="population", eps=0.25)
    assert advantages_G.tolist() == approx([0.8, -0.8])


def test_groups_do_not_see_each_other():
    rewards_KG = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    whole_KG = group_advantages(rewards_KG)
    for rewards_1G, advantages_G in zip(rewards_KG.split(1), whole_KG, strict=True):
        assert torch.equal(group_advantages(rewards_1G)[0], advantages_G)


@pytest.mark.parametrize("std", ["unbiased", "population", "none"])
def test_advantages_of_a_group_add_up_to_zero(std):
    rewards_KG = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)).double()
    advantages_KG = group_advantages(rewards_KG, std=std)
    sizes_K = advantages_KG.abs().sum(dim=1)
    assert_close(sizes_K + advantages_KG.sum(dim=1), sizes_K)


def test_neither_shift_nor_scale_of_the_rewards_matters():
    """0/1 and -1/+1 rewards are the same task (except for eps, which is added to their spread)."""
    rewards_KG = torch.tensor([[1.0, 0, 0, 1, 1], [0, 0, 1, 0, 0]])
    assert_close(
        group_advantages(rewards_KG, eps=0.0), group_advantages(2 * rewards_KG - 1, eps=0.0)
    )


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e30, -7.3])
@pytest.mark.parametrize("std", ["unbiased", "population", "none"])
def test_equal_rewards_give_exactly_zero(reward, std):
    """This holds even if the rounded mean of equal numbers differs from them."""
    rewards_KG = torch.full((2, 6), reward, dtype=torch.float64)
    assert reward != 0.1 or (rewards_KG.mean(dim=1) != 0.1).all()
    assert group_advantages(rewards_KG, std=std).eq(0).all()
    assert zero_variance(rewards_KG).tolist() == [True, True]


@pytest.mark.filterwarnings("ignore:std")
def test_a_group_of_one_has_nothing_to_be_compared_with():
    assert group_advantages(torch.tensor([[0.7]])).tolist() == [[0.0]]


def test_zero_variance_names_the_groups_without_a_signal():
    rewards_KG = torch.tensor([[1.0, 1, 1], [0, 0, 1], [0, 0, 0]])
    assert zero_variance(rewards_KG).tolist() == [True, False, True]


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(reward):
    with pytest.raises(ValueError, match="not finite"):
        group_advantages(torch.tensor([[0.0, reward]]))


# RLOO


def test_the_baseline_of_rloo_is_the_mean_of_the_others():
    """As TRL writes it: the group's sum less the own reward, over G - 1."""
    rewards_KG = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)).double()
    others_KG = (rewards_KG.sum(dim=1, keepdim=True) - rewards_KG) / 3
    assert_close(leave_one_out_advantages(rewards_KG), rewards_KG - others_KG, scale=1.0)


def test_rloo_by_hand():
    """Rewards 1, 0, 0, 0: the others have a mean of 0, or of 1/3."""
    advantages_KG = leave_one_out_advantages(torch.tensor([[1.0, 0, 0, 0]]))
    assert advantages_KG[0].tolist() == approx([1.0, *[-1 / 3] * 3])


def test_rloo_of_equal_rewards_is_exactly_zero():
    assert leave_one_out_advantages(torch.full((2, 6), 0.1).double()).eq(0).all()


def test_rloo_is_the_centred_reward_up_to_a_factor():
    """So the direction of its gradient is that of Dr. GRPO."""
    rewards_KG = torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    centred_KG = group_advantages(rewards_KG, std="none")
    assert_close(leave_one_out_advantages(rewards_KG), centred_KG * 8 / 7)


# REINFORCE++


def whitened(values_NS, mask_NS):
    """Mean and unbiased variance over the mask, as verl normalises advantages."""
    mean = (values_NS * mask_NS).sum() / mask_NS.sum()
    variance = ((values_NS - mean).square() * mask_NS).sum() / (mask_NS.sum() - 1)
    return (values_NS - mean) / variance.sqrt() * mask_NS


def batch_of(seed=0):
    """Return rewards of 3 groups of 4, their lengths, and the mask of tokens in rows of 6."""
    generator = torch.Generator().manual_seed(seed)
    rewards_KG = torch.rand(3, 4, generator=generator).double()
    lengths_N = torch.randint(1, 7, (12,), generator=generator)
    return rewards_KG, lengths_N, (torch.arange(6) < lengths_N[:, None]).double()


def test_reinforce_plus_plus_is_normalised_over_the_tokens_of_the_batch():
    rewards_KG, lengths_N, mask_NS = batch_of()
    expected_NS = whitened(rewards_KG.flatten()[:, None].expand(12, 6), mask_NS)
    advantage_N = batch_advantages(rewards_KG, lengths_N, eps=0.0).flatten()
    assert_close(advantage_N[:, None] * mask_NS, expected_NS, scale=1.0)


def test_its_baseline_form_takes_off_the_groups_mean_first():
    rewards_KG, lengths_N, mask_NS = batch_of()
    centred_N = (rewards_KG - rewards_KG.mean(dim=1, keepdim=True)).flatten()
    expected_NS = whitened(centred_N[:, None].expand(12, 6), mask_NS)
    centred_KG = group_advantages(rewards_KG, std="none")
    advantage_N = batch_advantages(centred_KG, lengths_N, eps=0.0).flatten()
    assert_close(advantage_N[:, None] * mask_NS, expected_NS, scale=1.0)


@pytest.mark.parametrize(
    ("std", "divisor"),
    [("unbiased", math.sqrt(1 / 4)), ("population", math.sqrt(3) / 4), ("none", 1)],
)
def test_reinforce_plus_plus_by_hand(std, divisor):
    """Rewards 1 and 0 of rollouts of 1 and 3 tokens: mean 1/4 over tokens, not 1/2."""
    rewards_KG, lengths_N = torch.tensor([[1.0, 0.0]]), torch.tensor([1, 3])
    advantages_KG = batch_advantages(rewards_KG, lengths_N, std=std, eps=0.0)
    assert advantages_KG[0].tolist() == approx([0.75 / divisor, -0.25 / divisor])


def test_an_easy_group_has_advantages_by_the_other_groups():
    """Unlike GRPO: a group of equal rewards is compared with the batch."""
    rewards_KG = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    advantages_KG = batch_advantages(rewards_KG, torch.ones(4, dtype=torch.long))
    assert (advantages_KG[0] > 0).all()
    assert advantages_KG[0].sum().item() == approx(-advantages_KG[1].sum().item())


@pytest.mark.parametrize("std", ["unbiased", "population", "none"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1)])
def test_a_batch_of_equal_rewards_is_exactly_zero(std, shape):
    rewards_KG = torch.full(shape, 0.1, dtype=torch.float64)
    lengths_N = torch.ones(rewards_KG.numel(), dtype=torch.long)
    assert batch_advantages(rewards_KG, lengths_N, std=std).eq(0).all()


def test_a_reward_of_the_batch_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        batch_advantages(torch.tensor([[0.0, math.nan]]), torch.tensor([1, 1]))


# A penalty in the reward


def penalties_of(lengths_N, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator).double() - 0.4 for n in lengths_N.tolist()]


def rows_of(penalties):
    return torch.nn.utils.rnn.pad_sequence(penalties, batch_first=True)


def test_a_reward_loses_the_penalties_of_all_its_tokens():
    penalties = [torch.tensor([0.5, 0.25]), torch.tensor([-1.0])]
    assert penalised_rewards(torch.tensor([[1.0, 0.0]]), penalties).tolist() == [[0.25, 1.0]]


def test_rloo_with_a_penalty_is_the_formula_of_trl():
    rewards_KG, lengths_N, _ = batch_of()
    penalties = penalties_of(lengths_N)
    reward_N = rewards_KG.flatten() - rows_of(penalties).sum(1)
    grouped_KG = reward_N.view(3, 4)
    baseline_KG = (grouped_KG.sum(dim=1, keepdim=True) - grouped_KG) / 3
    ours_KG = leave_one_out_advantages(penalised_rewards(rewards_KG, penalties))
    assert_close(ours_KG, grouped_KG - baseline_KG, scale=1.0)


def test_reinforce_plus_plus_with_a_penalty_is_the_formula_of_verl():
    """The reward is at the last token; returns are summed from the end, and normalised."""
    rewards_KG, lengths_N, mask_NS = batch_of()
    penalties = penalties_of(lengths_N)
    reward_NS = -rows_of(penalties)
    reward_NS = torch.cat([reward_NS, torch.zeros(12, 6 - reward_NS.shape[1])], dim=1)
    reward_NS[torch.arange(12), lengths_N - 1] += rewards_KG.flatten()
    return_NS, running_N = torch.zeros(12, 6).double(), torch.zeros(12).double()
    for t in reversed(range(6)):
        running_N = reward_NS[:, t] + running_N
        return_NS[:, t] = running_N
    expected_NS = whitened(return_NS, mask_NS)
    advantages = token_advantages(rewards_KG, penalties, eps=0.0)
    assert [len(advantage_T) for advantage_T in advantages] == lengths_N.tolist()
    assert_close(torch.cat(advantages), expected_NS[mask_NS.bool()], scale=1.0)


def test_returns_by_hand():
    """Reward 1, penalties 1, 2 and 3: returns -5, -4 and -2, with a mean of -11/3."""
    [advantage_T] = token_advantages(torch.ones(1, 1), [torch.tensor([1.0, 2, 3])], std="none")
    assert advantage_T.tolist() == approx([-4 / 3, -1 / 3, 5 / 3])


def test_without_a_penalty_tokens_have_the_advantage_of_their_rollout():
    rewards_KG, lengths_N, _ = batch_of()
    nothing = [torch.zeros(n) for n in lengths_N.tolist()]
    assert torch.equal(penalised_rewards(rewards_KG, nothing), rewards_KG)
    advantage_N = batch_advantages(rewards_KG, lengths_N).flatten()
    expected_T = advantage_N.repeat_interleave(lengths_N)
    assert torch.equal(torch.cat(token_advantages(rewards_KG, nothing)), expected_T)
