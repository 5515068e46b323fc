"""Masked rollouts (`rollout.overlong=mask`) move no weight, under any layout."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from ranks import join, on_ranks
from rounding import approx
from tiny_models import VOCAB, actor_config

from megatron_prepo.records import Prompt, Rollout

LENGTHS = (5, 9, 3, 4, 12, 6, 8, 2)
FINISHED = (True, False, True, True, False, True, False, True)
LAYOUTS = {
    "TP1": {},
    "TP2 SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "DP2": {"data": 2},
}


def rollouts(other_masked_tokens):
    """Return 4 groups of 2 rollouts of random tokens; those of masked ones can be others."""
    generator = torch.Generator().manual_seed(3)

    def tokens(count):
        return tuple(torch.randint(0, VOCAB, (count,), generator=generator).tolist())

    prompts = [Prompt(f"p{k}", f"text {k}", "1", tokens(4), (0, 4)) for k in range(4)]
    made = [
        Rollout(prompts[i // 2], tokens(n), (-0.5,) * n, f"completion {i}", FINISHED[i], 0)
        for i, n in enumerate(LENGTHS)
    ]
    if not other_masked_tokens:
        return made
    return [r if r.finished else replace(r, tokens=tokens(len(r.tokens))) for r in made]


def updated(actor, made):
    """Make one update as the loop does; returns its metrics and the weights."""
    from megatron_prepo.prepo.advantages import group_advantages
    from megatron_prepo.rewards.pool import Grade
    from megatron_prepo.trainer.groups import Groups
    from megatron_prepo.trainer.overlong import Overlong
    from megatron_prepo.trainer.policy_update import (
        TrainingBatch,
        score_rollouts,
        update_policy,
        weigh_by_entropy,
    )

    config = actor.config
    grades = (Grade(0.0), Grade(1.0)) * 4
    groups = Groups(overlong=Overlong.of(config.rollout)).extend(range(4), made, grades)
    old = score_rollouts(actor, made, temperature=1.0, loss=config.loss)
    weight_N = weigh_by_entropy(config.weighting, groups, old, 1)
    advantage_N = group_advantages(groups.shaped_rewards).flatten()
    metrics = update_policy(
        actor,
        TrainingBatch(groups, advantage_N, old, weight_N),
        aggregation=config.loss.aggregation,
        num_mini_batches=1,
    )
    weights = {name: tensor.clone() for name, tensor in actor.hf_weights()}
    return metrics, weights, actor.updates


def run_all(hf):
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.actor import Actor

    results = {}
    for name, layout in LAYOUTS.items():
        config = actor_config(
            hf,
            parallel=layout,
            rollout={"max_new_tokens": 12, "overlong": "mask"},
            data={"max_prompt_tokens": 4},
            train={"micro_batch_tokens": 32},
            optimizer={"lr": 1e-2, "adam_eps": 1e-2},
        )
        if not join(config.parallel.num_ranks):
            continue
        parallel.initialize(config.parallel, seed=1)
        for case in ("masked", "other tokens in masked ones", "all masked"):
            made = rollouts(other_masked_tokens=case.startswith("other"))
            if case == "all masked":
                made = [replace(rollout, finished=False) for rollout in made]
            results[name, case] = updated(Actor(config), made)
        results[name, "before"] = {n: t.clone() for n, t in Actor(config).hf_weights()}
        parallel.shut_down()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    hf = tiny_models.save(tiny_models.qwen2(), tmp_path_factory.mktemp("overlong") / "hf")
    return on_ranks(2, run_all, hf)[0]


def equal(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_a_masked_rollout_is_exactly_0(results, layout):
    """With other tokens there, every weight after the update is the same, bit for bit.

    Weights of unmasked rollouts would differ if entropies of masked ones were in their mean.
    """
    (metrics, weights, _), (other_metrics, other_weights, _) = (
        results[layout, case] for case in ("masked", "other tokens in masked ones")
    )
    assert metrics == other_metrics and metrics["loss/grad_norm"] > 0
    assert equal(weights, other_weights) and not equal(weights, results[layout, "before"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_that_is_masked_completely_moves_no_weight(results, layout):
    metrics, weights, updates = results[layout, "all masked"]
    assert (metrics, updates) == ({"loss/skipped_updates": 0}, 0)
    assert equal(weights, results[layout, "before"])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "TP1"])
def test_the_update_is_that_of_one_rank(results, layout):
    metrics, weights, _ = results[layout, "masked"]
    one_rank, reference, _ = results["TP1", "masked"]
    tolerance = {"operations": 1000, "dtype": torch.float32}
    for name in ("loss/policy", "loss/grad_norm"):
        assert metrics[name] == approx(one_rank[name], scale=1.0, **tolerance)
    for name, tensor in reference.items():
        largest = float(tensor.abs().max())
        assert weights[name].flatten().tolist() == approx(
            tensor.flatten().tolist(), scale=largest, **tolerance
        )
