"""Rollouts of groups without an advantage: they count in normalisers, and need no forward pass.

`tests/distributed/test_layouts.py` compares the resulting weights with float64: one rollout of each
of its scenarios has an advantage of 0.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from rounding import approx
from tiny_models import actor_config

from megatron_prepo.actor.actor import Actor, Scores
from megatron_prepo.config import AdvantageConfig, LossConfig
from megatron_prepo.prepo.advantages import group_advantages
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.run.stopwatch import Stopwatch
from megatron_prepo.trainer.groups import Groups
from megatron_prepo.trainer.guarded_update import UpdateGuard
from megatron_prepo.trainer.policy_update import (
    RolloutScores,
    TrainingBatch,
    estimate_advantages,
    mean_metrics,
    step_advantages,
    update_policy,
    weigh_by_entropy,
    weigh_by_importance,
)
from megatron_prepo.trainer.stages import score_old_policy

LENGTHS = (2, 3, 1, 4)


class RecordingActor:
    """Record what it is given to learn from."""

    def __init__(self):
        self.batches = []

    def update(self, rollouts):
        self.batches.append(rollouts)
        return {"loss/policy": 0.0}


def learn(config, actor, rollouts, rewards_KG, old_scores):
    """Do what the loop does with the old scores."""
    num_mini_batches = config.train.mini_batches
    grades = [Grade(reward) for reward in rewards_KG.flatten().tolist()]
    groups = Groups().extend(range(len(rewards_KG)), rollouts, grades)
    weight_N = weigh_by_entropy(config.weighting, groups, old_scores, num_mini_batches)
    batch = TrainingBatch(groups, group_advantages(rewards_KG).flatten(), old_scores, weight_N)
    return update_policy(
        actor,
        batch,
        aggregation=config.loss.aggregation,
        num_mini_batches=num_mini_batches,
        max_tokens=config.rollout.max_new_tokens,
    )


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("seq-mean-token-sum", [1 / 4] * 4),
        ("seq-mean-token-mean", [1 / (4 * length) for length in LENGTHS]),
        ("token-mean", [1 / sum(LENGTHS)] * 4),
        ("seq-mean-token-sum-norm", [1 / (4 * 5)] * 4),
    ],
)
def test_normalisers_count_all_rollouts(aggregation, expected):
    """Two groups of two rollouts, the second of which has nothing to learn from."""
    prompt = Prompt("p", "", "", (5, 6), (0, 2))
    rollouts = [Rollout(prompt, (7,) * n, (-1.0,) * n, "", True, 0) for n in LENGTHS]
    scores = [Scores(torch.full((n,), -1.0), torch.ones(n)) for n in LENGTHS]
    old = RolloutScores(scores, None, torch.ones(4).double(), torch.tensor(LENGTHS))
    config = actor_config(
        "unused", loss={"aggregation": aggregation}, rollout={"max_new_tokens": 5}
    )
    actor = RecordingActor()
    learn(config, actor, rollouts, torch.tensor([[0.0, 1.0], [1.0, 1.0]]), old)
    (batch,) = actor.batches
    assert [r.coefficient for r in batch] == approx(expected)
    assert [r.advantage != 0 for r in batch] == [True, True, False, False]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("group", [[0.5, -0.5], [0.0, 0.0]]),
        ("rloo", [[1.0, -1.0], [0.0, 0.0]]),
        ("reinforce++", [[0.25, -0.75], [0.25, 0.25]]),
        ("reinforce++-baseline", [[0.5, -0.5], [0.0, 0.0]]),
    ],
)
def test_each_method_of_advantages_without_a_division(method, expected):
    settings = AdvantageConfig(method=method, std="none")
    rewards_KG, lengths_N = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([2, 2, 2, 2])
    advantage_N = estimate_advantages(settings, rewards_KG, lengths_N)
    assert advantage_N.view(2, 2).tolist() == expected


KL = {"kl_coef": 0.5, "kl_in_reward": True}


@pytest.mark.parametrize(
    ("method", "loss", "rollouts", "tokens"),
    [
        ("group", {}, [0.5, -0.5], None),
        ("group", {"kl_coef": 0.5}, [0.5, -0.5], None),
        # rewards 1 - (1/2) (2 - 1) = 1/2 and 0 - (1/2) (-1) = 1/2
        ("group", KL, [0.0, 0.0], None),
        ("rloo", KL, [0.0, 0.0], None),
        ("reinforce++-baseline", KL, [0.0, 0.0], None),
        # returns 1/2 and 3/2, and 1/2, less their mean of 5/6
        ("reinforce++", KL, [1 / 6, -1 / 3], [[-1 / 3, 2 / 3], [-1 / 3]]),
    ],
)
def test_a_divergence_in_the_reward(method, loss, rollouts, tokens):
    """A first rollout of two tokens, 2 more and 1 less likely than at first; a second of one."""
    prompt, zeros_T = Prompt("p", "", "", (5, 6), (0, 2)), torch.zeros(2)
    old = [Scores(torch.tensor(v), zeros_T) for v in ([-1.0, -2.0], [-3.0])]
    first = [Scores(torch.tensor(v), zeros_T) for v in ([-3.0, -1.0], [-2.0])]
    entropy_N, lengths_N = torch.ones(2).double(), torch.tensor([2, 1])
    old_scores = RolloutScores(old, first if loss else None, entropy_N, lengths_N)
    both = [Rollout(prompt, (7,) * n, (-1.0,) * n, "", True, 0) for n in (2, 1)]
    groups = Groups().extend([0], both, [Grade(1.0), Grade(0.0)])
    settings = AdvantageConfig(method=method, std="none")
    advantage_N, advantages_T = step_advantages(settings, LossConfig(**loss), groups, old_scores)
    assert advantage_N.tolist() == approx(rollouts, scale=1.0)
    assert (advantages_T is None) == (tokens is None)
    actor = RecordingActor()
    batch = TrainingBatch(groups, advantage_N, old_scores, torch.ones(2), advantages_T)
    update_policy(actor, batch, aggregation="token-mean", num_mini_batches=1)
    for sequence, expected in zip(actor.batches[0], tokens or [None] * 2, strict=True):
        if expected is None:
            assert sequence.advantage_T is None
        else:
            assert sequence.advantage_T.tolist() == approx(expected, dtype=torch.float32)


def test_a_divergence_in_the_reward_needs_a_coefficient():
    with pytest.raises(ValueError, match=r"kl_in_reward=true has no effect with loss\.kl_coef=0"):
        LossConfig(kl_in_reward=True)


def test_importance_is_the_actors_over_the_engines_probability_and_moves_no_normaliser():
    """The engine's choices are twice, 1/5 times and exactly as likely for the actor."""
    prompt = Prompt("p", "", "", (5, 6), (0, 2))
    rollouts = [Rollout(prompt, (7, 8), (-1.0, -2.0), "", True, 0) for _ in range(2)]
    old_T = torch.tensor([-1.0 + math.log(2), -2.0 - math.log(5)]), torch.tensor([-1.0, -2.0])
    scores = [Scores(logprobs_T, torch.ones(2)) for logprobs_T in old_T]
    coefficients = {}
    for method, expected in {"truncated": [1.5, 0.2], "masked": [0.0, 0.0], "off": None}.items():
        config = actor_config("unused", loss={"importance": method, "importance_high": 1.5})
        old = RolloutScores(
            scores,
            None,
            torch.ones(2).double(),
            torch.tensor([2, 2]),
            weigh_by_importance(config.loss, scores, rollouts),
        )
        actor = RecordingActor()
        learn(config, actor, rollouts, torch.tensor([[0.0, 1.0]]), old)
        one, other = actor.batches[0]
        coefficients[method] = one.coefficient, other.coefficient
        if expected is None:
            assert one.importance_T is None
            continue
        assert one.importance_T.tolist() == approx(expected, dtype=torch.float32)
        assert other.importance_T.tolist() == [1.0, 1.0]
    assert coefficients["masked"] == coefficients["truncated"] == coefficients["off"]


@pytest.mark.parametrize(
    ("overlap", "age", "accepted"),
    [(False, 0, True), (False, 1, False), (True, 0, True), (True, 2, True), (True, 3, False)]
    + [(overlap, -1, False) for overlap in (False, True)],
)
def test_how_old_the_weights_of_a_rollout_may_be(overlap, age, accepted):
    """Weights must be current; overlapped, those of the previous step, two updates ago."""
    config = actor_config(
        "unused",
        rollout={"engine": "sglang"},
        loss={"importance": "truncated"},
        train={"mini_batches": 2, "overlap": overlap},
    )
    actor = SimpleNamespace(
        updates=5,
        score=lambda sequences, temperature: [
            Scores(torch.full((1,), -1.0), torch.ones(1)) for _ in sequences
        ],
        routed_differently=lambda: None,
    )
    old, fresh = (
        Rollout(Prompt("p", "", "", (5, 6), (0, 2)), (7,), (-1.0,), "", True, 5 - ago)
        for ago in (age, 0)
    )
    run = SimpleNamespace(seconds=Stopwatch())
    trainer = SimpleNamespace(config=config, actor=actor, run=run)
    groups = Groups((0,), (2,), (fresh, old), (Grade(0.0), Grade(1.0)))
    if accepted:
        assert score_old_policy(trainer, groups).staleness_N == (0, age)
    else:
        with pytest.raises(AssertionError, match=f"rollouts are {age} updates old"):
            score_old_policy(trainer, groups)


def test_skipped_updates_are_counted_and_not_averaged():
    updates = [{"loss/policy": 1.0}, None, {"loss/policy": 4.0}, None]
    assert mean_metrics(updates) == {"loss/policy": 2.5, "loss/skipped_updates": 2}
    assert mean_metrics([None]) == {"loss/skipped_updates": 1}


def test_a_mini_batch_without_a_token_to_learn_from_is_not_a_ratio_of_0():
    updates = [{"loss/policy": 0.0}, {"loss/policy": 2.0, "loss/ratio": 1.0}]
    for order in (updates, updates[::-1]):
        means = mean_metrics(order)
        assert (means["loss/policy"], means["loss/ratio"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("advantage", "loss", "experts", "computed"),
    [
        (0.0, {}, None, False),
        (0.1, {}, None, True),
        (-0.1, {}, None, True),
        (float("nan"), {}, None, True),  # must be detected, and refused
        (0.0, {"importance": "truncated"}, None, False),
        (0.0, {"entropy_coef": 0.01}, None, True),
        (0.0, {"kl_coef": 0.01}, None, True),
        (0.0, {}, 8, True),
    ],
)
def test_which_rollouts_cost_a_pass(advantage, loss, experts, computed):
    mcore = SimpleNamespace(num_moe_experts=experts)
    actor = SimpleNamespace(config=actor_config("unused", loss=loss), mcore=mcore)
    assert Actor.has_gradient(actor, advantage) == computed
    guard = UpdateGuard(actor.config, actor, None)
    actor.has_gradient = lambda advantage: Actor.has_gradient(actor, advantage)
    assert guard.learns_from(advantage) == computed
