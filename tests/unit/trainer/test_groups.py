"""Groups of a step that differ in size: extended, trained on, divided, weighed and recorded."""

from types import SimpleNamespace

import pytest
import torch
from rounding import approx

from megatron_prepo.actor.actor import Scores
from megatron_prepo.config import AdvantageConfig
from megatron_prepo.prepo.advantages import zero_variance
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.selection import METHODS
from megatron_prepo.selection.base import Candidates
from megatron_prepo.selection.rounds import Choice
from megatron_prepo.trainer import stages
from megatron_prepo.trainer.groups import Groups
from megatron_prepo.trainer.policy_update import (
    RolloutScores,
    TrainingBatch,
    estimate_advantages,
    update_policy,
    weigh_by_entropy,
)
from megatron_prepo.trainer.step_ledger import ledger_entries
from megatron_prepo.trainer.step_metrics import selection_metrics
from megatron_prepo.trainer.step_texts import rollout_texts
from tests.tiny_models import actor_config
from tests.unit.rollout.test_pieces import Words
from tests.unit.trainer.test_policy_update import RecordingActor

PROMPTS = [Prompt(f"p{i}", "", "", (5, 6), (0, 2)) for i in range(4)]


def rollout(position: int, sample: int) -> Rollout:
    tokens = (10 * position + sample,)
    return Rollout(PROMPTS[position], tokens, (-1.0,), "", True, 0)


def round_of(groups: Groups, rewards: dict[int, list[float]], first=0) -> Groups:
    """Return the groups after a round with these rewards, by position among the candidates."""
    rollouts = [rollout(p, first + n) for p, row in rewards.items() for n in range(len(row))]
    grades = [Grade(reward) for row in rewards.values() for reward in row]
    return groups.extend(list(rewards), rollouts, grades, [len(row) for row in rewards.values()])


def two_rounds() -> Groups:
    """Return a pilot of two rollouts for 3, 0 and 1, after which 0 and 1 get more."""
    pilot = round_of(Groups(), {3: [1.0, 1.0], 0: [0.0, 1.0], 1: [1.0, 0.0]})
    return round_of(pilot, {0: [1.0, 0.0, 0.0], 1: [1.0]}, first=2)


def test_a_later_round_extends_the_groups_of_its_prompts():
    groups = two_rounds()
    assert (groups.chosen, groups.sizes) == ((3, 0, 1), (2, 5, 3))
    assert [r.tokens[0] for r in groups.rollouts] == [30, 31, 0, 1, 2, 3, 4, 10, 11, 12]
    assert [row.tolist() for row in groups.rewards] == [[1, 1], [0, 1, 1, 0, 0], [1, 0, 1]]
    assert [prompt.id for prompt in groups.prompts] == ["p3", "p0", "p1"]


def test_larger_groups_with_an_advantage_are_trained_on_first():
    groups = round_of(two_rounds(), {2: [0.0, 1.0, 0.0]})
    trained = groups.select_for_training(2)
    assert (trained.chosen, trained.sizes) == ((0, 1), (5, 3))
    assert [r.tokens[0] for r in trained.rollouts] == [0, 1, 2, 3, 4, 10, 11, 12]
    assert groups.select_for_training(3).chosen == (0, 1, 2)
    assert groups.select_for_training(4).chosen == (3, 0, 1, 2)


def test_of_equal_groups_the_first_with_an_advantage_are_trained_on():
    """The order before groups could differ: a stable sort by whether there is an advantage."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        rewards_KG = torch.randint(0, 2, (9, 3), generator=generator).float()
        grades = [Grade(reward) for reward in rewards_KG.flatten().tolist()]
        groups = Groups().extend(range(9), [rollout(0, n) for n in range(27)], grades)
        assert torch.equal(groups.rewards, rewards_KG)
        useless_K = zero_variance(rewards_KG)
        kept = sorted(useless_K.int().argsort(stable=True)[:4].tolist())
        trained = groups.select_for_training(4)
        assert trained.chosen == tuple(kept)
        members = [3 * k + g for k in kept for g in range(3)]
        assert trained.rollouts == tuple(groups.rollouts[i] for i in members)


def test_mini_batches_do_not_split_a_group():
    assert two_rounds().mini_batches(2) == [[0, 1, 7, 8, 9], [2, 3, 4, 5, 6]]
    assert two_rounds().mini_batches(1) == [list(range(10))]


def batch_of(groups: Groups, config=None) -> TrainingBatch:
    """Return the batch of groups whose rollouts have entropies 1, 2, 3 ..."""
    config, num = config or actor_config("unused"), len(groups.rollouts)
    scores = [Scores(torch.full((1,), -1.0), torch.ones(1)) for _ in range(num)]
    entropy_N = torch.arange(1.0, num + 1).double()
    old = RolloutScores(scores, None, entropy_N, torch.ones(num).long(), staleness_N=(0,) * num)
    weight_N = weigh_by_entropy(config.weighting, groups, old, config.train.mini_batches)
    settings = AdvantageConfig(std="none")
    advantage_N = estimate_advantages(settings, groups.shaped_rewards, old.lengths_N)
    return TrainingBatch(groups, advantage_N, old, weight_N)


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_a_rollout_weighs_the_same_whatever_the_size_of_its_group(mini_batches):
    """The loss is a mean over the rollouts of an update, of 10, or of 5 and 5."""
    train, weighting = {"mini_batches": mini_batches}, {"method": "none"}
    config, actor = actor_config("unused", train=train, weighting=weighting), RecordingActor()
    batch = batch_of(two_rounds(), config)
    update_policy(actor, batch, aggregation="seq-mean-token-sum", num_mini_batches=mini_batches)
    assert [len(sequences) for sequences in actor.batches] == [10 // mini_batches] * mini_batches
    for sequences in actor.batches:
        assert [s.coefficient for s in sequences] == approx([mini_batches / 10] * len(sequences))
        assert sum(s.advantage for s in sequences) == approx(0.0, scale=1.0)


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        *((method, {}) for method in ("group", "rloo", "posterior", "rl_zvp")),
        *((method, {"kl_coef": 0.5, "kl_in_reward": True}) for method in ("group", "rloo")),
    ],
)
def test_advantages_in_unequal_groups_are_those_of_each_group_alone(method, loss):
    selection = {"method": "mapp"} if method == "posterior" else {}
    config = actor_config("unused", advantage={"method": method}, loss=loss, selection=selection)
    chooser = METHODS["mapp"](config.selection, total_steps=1, seed=1, pass_reward=1.0)
    trainer = SimpleNamespace(config=config, selector=chooser)
    groups = two_rounds()
    old = [Scores(torch.full((1,), -0.1 * n), torch.full((1,), 1.0 + n)) for n in range(10)]
    first = [Scores(torch.full((1,), -0.3 * n), torch.ones(1)) for n in range(10)]

    def advantages(groups: Groups, index: range) -> list[float]:
        scores, references = ([of[i] for i in index] for of in (old, first))
        entropy_N = torch.cat([one.entropy_T for one in scores]).double()
        ones_N = torch.ones(len(index)).long()
        scored = RolloutScores(scores, references if loss else None, entropy_N, ones_N)
        return stages.compute_advantages(trainer, groups, scored)[0].tolist()

    alone = []
    for position, index in zip(groups.chosen, groups.members, strict=True):
        rollouts, grades = ([of[i] for i in index] for of in (groups.rollouts, groups.grades))
        alone += advantages(Groups().extend([position], rollouts, grades), index)
    assert advantages(groups, range(10)) == approx(alone, scale=1.0)
    assert alone[2:] != [0.0] * 8


def test_entropies_without_groups_of_equal_rewards():
    """The mean is over rollouts 3 to 10; the first group has none but is weighed by it, too."""
    config = actor_config("unused", weighting={"include_zero_variance": False, "clamp": None})
    batch = batch_of(two_rounds(), config)
    assert batch.weight_N.tolist() == approx([n / 6.5 for n in range(1, 11)])


def test_ledger_texts_and_metrics_know_the_groups():
    groups = two_rounds()
    batch = batch_of(groups.select_for_training(2))
    entries = ledger_entries("mine", 0, Candidates(PROMPTS), groups, Groups(), batch)
    assert [(e.prompt_id, e.sample) for e in entries] == [
        *[("p3", 0), ("p3", 1)],
        *[("p0", n) for n in range(5)],
        *[("p1", n) for n in range(3)],
    ]
    assert [e.trained for e in entries] == [False] * 2 + [True] * 8
    assert [e.zero_variance for e in entries] == [True] * 2 + [False] * 8
    line = rollout_texts(Words(), 0, Candidates(PROMPTS), groups, batch, None)
    assert [len(prompt["rollouts"]) for prompt in line["prompts"]] == [2, 5, 3]
    found = [r["advantage"] for r in line["prompts"][2]["rollouts"]]
    assert found == approx([1 / 3, -2 / 3, 1 / 3])
    metrics = selection_metrics(Candidates(PROMPTS, torch.tensor([3.0, 2, 9, 1])), groups)
    assert metrics["reward/mean"] == approx(0.6, dtype=torch.float32)  # over rollouts
    assert metrics["reward/zero_variance_ratio"] == approx(1 / 3)
    assert metrics["selection/groups_paid"] == 3
    assert metrics["ppl/spearman_with_reward"] == approx(-1.0)  # means 1, 2/5 and 2/3


def test_a_selector_observes_a_tensor_unless_it_asked_for_unequal_groups():
    seen = []
    trainer = SimpleNamespace(
        run=SimpleNamespace(seconds=lambda name: torch.no_grad()),
        grader=SimpleNamespace(
            grade=lambda rollouts: [Grade(float(r.tokens[0])) for r in rollouts]
        ),
        selector=SimpleNamespace(observe=lambda *what: seen.append(what)),
    )
    for samples in ([range(2)] * 2, [range(1), range(1, 3)]):
        rollouts = [rollout(p, n) for p, numbers in enumerate(samples) for n in numbers]
        stages.grade(trainer, Choice([0, 1], PROMPTS[:2], samples), rollouts)
    (prompts, equal), (_, unequal) = seen
    assert prompts == PROMPTS[:2] and equal.tolist() == [[0, 1], [10, 11]]
    assert [row.tolist() for row in unequal] == [[0], [11, 12]]
