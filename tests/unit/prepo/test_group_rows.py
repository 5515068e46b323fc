"""Groups of unequal size: each has the advantages that it would have on its own."""

from functools import partial

import pytest
import torch
from rounding import approx

from megatron_prepo.config import AdvantageConfig
from megatron_prepo.prepo.advantages import (
    batch_advantages,
    group_advantages,
    leave_one_out_advantages,
    zero_variance,
)
from megatron_prepo.prepo.entropy_advantages import directions
from megatron_prepo.prepo.group_rows import as_rows, each_group, flat
from megatron_prepo.prepo.posterior_advantages import posterior_advantages
from megatron_prepo.trainer.policy_update import estimate_advantages

SIZES = [3, 1, 2, 3]
REWARD_N = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0, 0])


def test_rows_of_one_size_are_a_tensor_and_others_a_tuple():
    values_N = torch.arange(6.0)
    assert torch.equal(as_rows(values_N, [3, 3]), values_N.view(2, 3))
    rows = as_rows(values_N, [1, 3, 2])
    assert [row.tolist() for row in rows] == [[0], [1, 2, 3], [4, 5]]
    assert torch.equal(flat(rows), values_N)


@pytest.mark.parametrize("std", ["unbiased", "population", "none"])
def test_groups_of_one_size_are_computed_together_as_before(std):
    """Bit for bit, as float rounding may depend on the shape."""
    rewards_KG = torch.rand(7, 5, generator=torch.Generator().manual_seed(3))
    together = each_group(partial(group_advantages, std=std), rewards_KG)
    assert torch.equal(together, group_advantages(rewards_KG, std=std))
    settings, lengths_N = AdvantageConfig(std=std), torch.arange(1, 36)
    for method, expected in [
        ("group", group_advantages(rewards_KG, std=std)),
        ("rloo", leave_one_out_advantages(rewards_KG)),
        ("reinforce++", batch_advantages(rewards_KG, lengths_N, std=std)),
    ]:
        settings = AdvantageConfig(method=method, std=std)
        advantage_N = estimate_advantages(settings, rewards_KG, lengths_N)
        assert torch.equal(advantage_N, expected.flatten())


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("group", [2 / 3, -1 / 3, -1 / 3, 0, 0.5, -0.5, 0, 0, 0]),
        ("rloo", [1, -0.5, -0.5, 0, 1, -1, 0, 0, 0]),
        ("reinforce++", [2 / 3, -1 / 3, -1 / 3, 2 / 3, 2 / 3, *[-1 / 3] * 4]),
        ("reinforce++-baseline", [2 / 3, -1 / 3, -1 / 3, 0, 0.5, -0.5, 0, 0, 0]),
    ],
)
def test_advantages_of_unequal_groups_by_hand(method, expected):
    """Rewards 1 0 0 | 1 | 1 0 | 0 0 0, without a division; the single rollout has nothing to be
    compared with but the batch."""
    settings = AdvantageConfig(method=method, std="none")
    lengths_N = torch.ones(9, dtype=torch.long)
    advantage_N = estimate_advantages(settings, as_rows(REWARD_N, SIZES), lengths_N)
    assert advantage_N.tolist() == approx(expected, scale=1.0)


@pytest.mark.parametrize("std", ["unbiased", "population", "none"])
def test_a_group_of_one_has_no_advantage(std):
    assert group_advantages(torch.tensor([[0.3], [1.0]]), std=std).tolist() == [[0.0], [0.0]]
    assert leave_one_out_advantages(torch.tensor([[0.3]])).tolist() == [[0.0]]
    assert zero_variance(as_rows(REWARD_N, SIZES)).tolist() == [False, True, False, True]


@pytest.mark.parametrize("method", ["group", "rloo", "reinforce++", "reinforce++-baseline"])
def test_the_order_of_the_groups_does_not_matter(method):
    """Lengths of 1 to 9 tokens move with their rollouts."""
    order, settings = [2, 3, 0, 1], AdvantageConfig(method=method)
    rewards, lengths = as_rows(REWARD_N, SIZES), torch.arange(1, 10).split(SIZES)
    straight = estimate_advantages(settings, rewards, torch.cat(lengths)).split(SIZES)
    moved = estimate_advantages(
        settings, tuple(rewards[k] for k in order), torch.cat([lengths[k] for k in order])
    )
    assert moved.tolist() == approx(torch.cat([straight[k] for k in order]).tolist(), scale=1.0)


def test_posterior_and_directions_of_a_group_are_those_it_has_alone():
    passed, alpha_K = as_rows(REWARD_N >= 1, SIZES), torch.tensor([2.0, 3.0, 4.0, 2.0]).double()
    beta_K = torch.tensor([3.0, 2.0, 4.0, 5.0]).double()
    together = each_group(posterior_advantages, passed, alpha_K, beta_K)
    for k, row in enumerate(passed):
        alone_KG = posterior_advantages(row[None], alpha_K[k : k + 1], beta_K[k : k + 1])
        assert torch.equal(together[k], alone_KG[0])
    assert together[1].tolist() == [0.0]
    rewards = as_rows(REWARD_N, SIZES)
    sign = each_group(partial(directions, pass_reward=1.0), rewards, rewards)
    assert flat(sign).tolist() == [0, 0, 0, 1, 0, 0, -1, -1, -1]
