"""Advantages by token entropy: equation 5 of RL-ZVP, and what its gradient is."""

from dataclasses import dataclass

import pytest
import torch
from rounding import approx, assert_close

from megatron_prepo.actor.actor import Scores, _loss_terms
from megatron_prepo.config import Config
from megatron_prepo.prepo.advantages import group_advantages
from megatron_prepo.prepo.entropy_advantages import directions, entropy_advantages
from megatron_prepo.prepo.loss import policy_loss
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.trainer.groups import Groups
from megatron_prepo.trainer.overlong import KEEP, Overlong
from megatron_prepo.trainer.policy_update import RolloutScores, TrainingBatch, update_policy
from megatron_prepo.trainer.stages import compute_advantages
from tests.tiny_models import actor_config
from tests.unit.trainer.test_policy_update import RecordingActor


@dataclass
class Trainer:
    """As much of a trainer as the advantages need."""

    config: Config


def trainer_with(**advantage):
    return Trainer(actor_config("unused", advantage={"method": "rl_zvp", **advantage}))


def test_directions_of_groups_without_variance():
    """Equal rewards below the largest are failures; a group with variance has no direction."""
    rewards_KG = torch.tensor([[1.0, 1, 1], [0, 0, 0], [0.1, 0.1, 0.1], [1, 0, 1], [0.1, 0, 0]])
    assert directions(rewards_KG, rewards_KG, 1.0)[:, 0].tolist() == [1, -1, -1, 0, 0]


def test_a_penalty_makes_no_failure_of_a_pass():
    """Both completions passed and were penalised alike: no variance, and a pass."""
    passes_KG = torch.ones(2, 2)
    shaped_KG = torch.tensor([[0.5, 0.5], [0.5, 1.0]])
    assert directions(passes_KG, shaped_KG, 1.0).tolist() == [[1, 1], [0, 0]]


def test_passes_and_failures_that_a_penalty_makes_equal_have_no_direction():
    """The pass was cut off, and lost its reward."""
    rewards_KG, shaped_KG = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)
    assert directions(rewards_KG, shaped_KG, 1.0).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("sign", "expected"), [(1, [0.25, 1.0, 0.0]), (-1, [-0.75, 0.0, -1.0]), (0, [3.0, 3.0, 3.0])]
)
def test_advantages_by_hand(sign, expected):
    """They are constants in the loss."""
    entropy_T = torch.tensor([0.5, 2.0, 0.0], requires_grad=True)
    own_KG, sign_KG = torch.tensor([[3.0]]), torch.tensor([[sign]])
    [advantage_T] = entropy_advantages(own_KG, sign_KG, [entropy_T], scale=0.5)
    assert advantage_T.tolist() == expected and not advantage_T.requires_grad


def groups_of(rewards_KG, lengths, overlong=KEEP):
    prompt = Prompt("p", "", "", (5, 6), (0, 2))
    rollouts = [Rollout(prompt, (7,) * n, (-1.0,) * n, "", True, 0) for n in lengths]
    grades = [Grade(reward) for reward in rewards_KG.flatten().tolist()]
    return Groups(overlong=overlong).extend(range(len(rewards_KG)), rollouts, grades)


def batch_of(rewards_KG, entropies, overlong=KEEP, **advantage):
    """Return the batch that the loop's stages make of rollouts with these token entropies."""
    lengths = [len(entropy_T) for entropy_T in entropies]
    groups = groups_of(rewards_KG, lengths, overlong)
    scores = [Scores(torch.full((n,), -1.0), e) for n, e in zip(lengths, entropies, strict=True)]
    weight_N = torch.ones(len(lengths)).double()
    old = RolloutScores(scores, None, weight_N, torch.tensor(lengths))
    advantage_N, advantages_T = compute_advantages(trainer_with(**advantage), groups, old)
    return TrainingBatch(groups, advantage_N, old, weight_N, advantages_T)


def sequences_of(*args, **settings):
    """Return what the actor is given, one sequence per rollout."""
    actor = RecordingActor()
    batch = batch_of(*args, **settings)
    update_policy(actor, batch, aggregation="seq-mean-token-sum", num_mini_batches=1)
    return actor.batches[0]


REWARDS_KG = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
ENTROPIES = [torch.tensor(e) for e in ([0.5, 2], [1.0], [0.25, 1, 4], [3.0], [1.0, 2], [0.0])]


def test_the_gradient_is_that_of_the_papers_advantages():
    """At ratio 1: d loss / d logprob of a token is minus coefficient times its advantage."""
    sequences = sequences_of(REWARDS_KG, ENTROPIES, zvp_scale=0.5)
    terms = _loss_terms(sequences, torch.device("cpu"))
    logprobs_T = terms.old_logprobs_T.clone().requires_grad_()
    loss, _ = policy_loss(logprobs_T, torch.zeros_like(logprobs_T), terms)
    (gradient_T,) = torch.autograd.grad(loss, logprobs_T)
    positive, negative = [0.25, 1.0, 0.5], [-1.875, -1.5, 0.0, 0.0]
    mixed = group_advantages(REWARDS_KG[2:])[0].tolist()
    advantages = [*positive, *negative, mixed[0], mixed[0], mixed[1]]
    assert gradient_T.tolist() == approx([-a / 6 for a in advantages], dtype=torch.float32)


def test_groups_with_variance_are_those_of_grpo_and_others_have_their_means():
    batch = batch_of(REWARDS_KG, ENTROPIES)
    advantages_KG = batch.advantage_N.view(3, 2)
    assert advantages_KG[2].tolist() == approx(group_advantages(REWARDS_KG)[2].tolist())
    assert advantages_KG[:2].tolist() == [
        approx([0.125, 0.1], dtype=torch.float32),
        approx([-0.225, 0.0], dtype=torch.float32),
    ]


def test_penalised_groups_of_equal_length_have_no_variance():
    """All three tokens of a limit of three: each reward is lowered by 1."""
    overlong = Overlong("penalty", max_tokens=3, buffer=2)
    entropies = [torch.tensor([1.0, 2, 3])] * 2
    [first, _] = sequences_of(torch.ones(1, 2), entropies, overlong, zvp_scale=1.0)
    assert first.advantage_T.tolist() == [1.0, 2.0, 3.0]


def test_losses_of_micro_batches_add_up_to_that_of_the_batch():
    sequences = sequences_of(REWARDS_KG, ENTROPIES)

    def loss(part):
        terms = _loss_terms(part, torch.device("cpu"))
        logprobs_T = terms.old_logprobs_T + 0.1
        return policy_loss(logprobs_T, torch.zeros_like(logprobs_T), terms)[0]

    for cut in range(1, 6):
        parts = loss(sequences[:cut]) + loss(sequences[cut:])
        assert_close(parts, loss(sequences), scale=1.0)


def test_other_methods_have_advantages_of_rollouts():
    batch = batch_of(REWARDS_KG, ENTROPIES, method="group")
    assert batch.advantages_T is None
    assert torch.equal(batch.advantage_N, group_advantages(REWARDS_KG).flatten())
