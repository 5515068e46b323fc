"""Completions that are cut off: masked, punished, or trained on like any other."""

from dataclasses import replace

import pytest
import torch
from rounding import approx
from tiny_models import actor_config

from megatron_prepo.actor.actor import Scores
from megatron_prepo.config import RolloutConfig
from megatron_prepo.errors import UserError
from megatron_prepo.prepo.advantages import group_advantages
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.selection.base import Candidates
from megatron_prepo.trainer.groups import Groups
from megatron_prepo.trainer.overlong import Overlong
from megatron_prepo.trainer.policy_update import (
    RolloutScores,
    TrainingBatch,
    update_policy,
    weigh_by_entropy,
)
from megatron_prepo.trainer.step_ledger import ledger_entries
from megatron_prepo.trainer.step_metrics import overlong_metrics, selection_metrics
from tests.unit.trainer.test_policy_update import RecordingActor

LIMIT = 4
PROMPTS = [Prompt(f"p{k}", "", "", (5, 6), (0, 2)) for k in range(2)]
REWARDS = (1.0, 0.0, 1.0, 1.0)
LENGTHS = (2, LIMIT, 3, LIMIT)
FINISHED = (True, False, True, True)
"""The second is cut off; the last ended with its stop token at the limit."""
ENTROPIES = (1.0, 5.0, 2.0, 3.0)


def groups_of(method, finished=FINISHED, rewards=REWARDS, aborted=()):
    rollouts = [
        Rollout(PROMPTS[i // 2], (7,) * n, (-1.0,) * n, "", ended, 0, aborted=i in aborted)
        for i, (n, ended) in enumerate(zip(LENGTHS, finished, strict=True))
    ]
    grades = [Grade(reward) for reward in rewards]
    return Groups(overlong=Overlong(method, LIMIT, 2)).extend((0, 1), rollouts, grades)


def batch_of(config, groups):
    scores = [Scores(torch.full((n,), -1.0), torch.ones(n)) for n in LENGTHS]
    old = RolloutScores(
        scores,
        None,
        torch.tensor(ENTROPIES).double(),
        torch.tensor(LENGTHS),
        staleness_N=(0,) * len(LENGTHS),
    )
    weight_N = weigh_by_entropy(config.weighting, groups, old, config.train.mini_batches)
    return TrainingBatch(groups, group_advantages(groups.shaped_rewards).flatten(), old, weight_N)


def learn(groups, mini_batches=1, **loss):
    config = actor_config("unused", loss=loss, train={"mini_batches": mini_batches})
    actor, batch = RecordingActor(), batch_of(config, groups)
    metrics = update_policy(
        actor, batch, aggregation=config.loss.aggregation, num_mini_batches=mini_batches
    )
    return actor.batches, metrics, batch


@pytest.mark.parametrize(
    ("aggregation", "normalisers"),
    [
        ("seq-mean-token-sum", [3, 3, 3]),
        ("seq-mean-token-mean", [3 * 2, 3 * 3, 3 * 4]),
        ("token-mean", [2 + 3 + 4] * 3),
    ],
)
def test_a_masked_rollout_is_in_its_group_but_neither_in_the_loss_nor_in_its_means(
    aggregation, normalisers
):
    """Advantages are those of (1, 0); weights are relative to the entropies 1, 2 and 3."""
    [batch], _, _ = learn(groups_of("mask"), aggregation=aggregation)
    assert [len(r.sequence.tokens) - 2 for r in batch] == [2, 3, 4]
    assert batch[0].advantage == approx(0.5 / (0.5**0.5 + 1e-6))
    expected = [w / n for w, n in zip((1 / 2, 2 / 2, 3 / 2), normalisers, strict=True)]
    assert [r.coefficient for r in batch] == approx(expected)


def test_by_default_it_is_trained_on():
    [batch], _, of = learn(groups_of("keep"))
    assert len(batch) == 4
    assert [r.advantage for r in batch[:2]] == approx(
        [0.5 / (0.5**0.5 + 1e-6), -batch[0].advantage]
    )
    assert overlong_metrics(of.groups) == {}


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_a_batch_that_is_masked_completely_is_no_update(mini_batches):
    batches, metrics, batch = learn(groups_of("mask", finished=[False] * 4), mini_batches)
    assert batches == []
    assert metrics == {"loss/skipped_updates": 0}
    metrics = batch.metrics(actor_config("unused").loss)
    assert metrics["rollout/masked"] == 4
    assert not any(name.startswith("weight/") for name in metrics)


def test_a_mini_batch_of_which_nothing_is_left_is_no_update():
    batches, _, _ = learn(groups_of("mask", finished=(False, False, True, True)), mini_batches=2)
    assert [len(batch) for batch in batches] == [2]


def test_an_aborted_completion_is_masked_too():
    """A slow server is no reason to learn from half an answer."""
    [batch], _, _ = learn(groups_of("mask", finished=(False, False, True, True), aborted=(0,)))
    assert len(batch) == 2


def test_a_group_without_a_finished_rollout_is_replaced_first():
    """Both groups have an advantage; of the first, nothing would be learnt."""
    groups = groups_of("mask", finished=(False, False, True, True), rewards=(1.0, 0.0, 1.0, 0.0))
    assert groups.select_for_training(1).chosen == (1,)
    assert replace(groups, overlong=Overlong()).select_for_training(1).chosen == (0,)


def test_the_penalty_is_added_before_the_advantages_and_to_nothing_else():
    """Equation 13 with L_max = 4 and L_cache = 2: lengths 2, 3 and 4 get 0, -1/2 and -1."""
    groups = groups_of("penalty")
    assert groups.shaped_rewards.tolist() == [[1.0, -1.0], [0.5, 0.0]]
    assert groups.rewards.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    [batch], _, of = learn(groups)
    std = 0.125**0.5
    assert [r.advantage for r in batch[2:]] == approx(
        [0.25 / (std + 1e-6), -0.25 / (std + 1e-6)], dtype=torch.float32
    )
    metrics = selection_metrics(Candidates(PROMPTS), groups) | overlong_metrics(groups)
    assert metrics["reward/mean"] == 0.75
    assert metrics["reward/zero_variance_ratio"] == 0.0
    assert (metrics["rollout/penalised"], metrics["reward/overlong_penalty"]) == (3, -0.625)
    entries = ledger_entries("prepo", 0, Candidates(PROMPTS), groups, Groups(), of)
    assert [entry.reward for entry in entries] == list(REWARDS)
    assert not any(entry.zero_variance for entry in entries)


def test_the_ledger_records_what_was_masked_as_untrained():
    _, _, batch = learn(groups_of("mask"))
    entries = ledger_entries("prepo", 0, Candidates(PROMPTS), batch.groups, Groups(), batch)
    assert [entry.trained for entry in entries] == [True, False, True, True]
    assert [entry.weight for entry in entries] == [0.5, None, 1.0, 1.5]
    assert [entry.mean_entropy for entry in entries] == list(ENTROPIES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlong_buffer": 2}, "overlong_buffer=2 is used by rollout.overlong=penalty only"),
        ({"overlong": "penalty", "overlong_buffer": 5}, "must be at most rollout.max_new_tokens=4"),
        ({"overlong": "penalty", "overlong_buffer": 0}, "must be at least 1"),
    ],
)
def test_a_buffer_without_a_penalty_or_beyond_the_limit_is_an_error(settings, message):
    with pytest.raises(UserError, match=message):
        actor_config("unused", rollout=settings)


def test_the_buffer_is_a_fifth_of_the_limit_unless_set():
    of = [RolloutConfig(max_new_tokens=limit).penalty_buffer for limit in (20480, 3)]
    assert of == [4096, 1]
    assert (
        RolloutConfig(max_new_tokens=4, overlong="penalty", overlong_buffer=2).penalty_buffer == 2
    )
