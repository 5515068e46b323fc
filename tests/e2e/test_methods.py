"""Tiny runs of every method of prompt selection: generated and trained prompts, and two ranks."""

from collections import Counter
from pathlib import Path

import pytest
from ranks import on_ranks

from megatron_prepo.run.ledger import read
from megatron_prepo.selection import METHODS
from tests.e2e.laptop import metrics, summary, train_in_ranks

P, K, G, BUDGET = 8, 2, 4, 20
TINY = [
    "parallel.tensor=1",
    "train.total_steps=3",
    f"selection.num_candidates={P}",
    f"selection.num_selected={K}",
    f"rollout.samples_per_prompt={G}",
    "checkpoint.optimizer=false",
    "eval.every=0",
    "eval.max_prompts=2",
    "eval.samples_per_prompt=1",
]
ON_TWO_RANKS = ["greso", "dapo", "mopps", "mapp", "kgps", "dps", "hive", "foresight"]
ON_TWO_RANKS += ["vip", "pilot_commit"]
WITH = {
    "mapp": ["advantage.method=posterior"],
    "vip": ["selection.vip_least=3", "selection.vip_most=5"],
}
"""The rest of a method that is more than a selection, and what makes groups of G = 4 differ."""


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory) -> Path:
    """Directories `METHOD` of runs with a budget, and `hopeless` without one."""
    root = tmp_path_factory.mktemp("one")
    budget = [*TINY, "train.total_steps=9", f"train.rollout_budget={BUDGET}"]
    runs = {
        str(root / name): [f"selection.method={name}", *budget, *WITH.get(name, [])]
        for name in METHODS
    }
    runs[str(root / "hopeless")] = [
        *TINY,
        "selection.method=dapo",
        "optimizer.lr=0",
        "rollout.max_new_tokens=1",
    ]
    on_ranks(1, train_in_ranks, 1, runs)
    return root


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("two")
    runs = {
        str(root / name): [
            *TINY,
            f"selection.method={name}",
            "parallel.data=2",
            *WITH.get(name, []),
        ]
        for name in ON_TWO_RANKS
    }
    runs[str(root / "hidden states")] = [
        *TINY,
        "selection.method=foresight",
        "selection.foresight_hidden=4",
        "parallel.data=2",
    ]
    on_ranks(2, train_in_ranks, 2, runs)
    return root


def test_hidden_states_are_of_both_ranks_prompts(on_two_ranks):
    """Each rank asserts that its choice is the other's; the features change the choice."""
    chosen = [
        [entry.prompt_id for entry in read(on_two_ranks / name / "ledger.jsonl")]
        for name in ("foresight", "hidden states")
    ]
    assert len(chosen[0]) == len(chosen[1]) and chosen[0] != chosen[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_ends_the_run_after_the_step_that_reaches_it(on_one_rank, method):
    entries, result = (
        list(read(on_one_rank / method / "ledger.jsonl")),
        summary(on_one_rank / method),
    )
    assert len(entries) == result["rollouts"] >= BUDGET
    last = result["steps"] - 1
    assert sum(entry.step < last for entry in entries) < BUDGET
    assert {entry.step for entry in entries} == set(range(result["steps"]))
    assert sum(entry.length for entry in entries) == result["tokens"]
    assert [step["rollout/paid"] for step in metrics(on_one_rank / method)][-1] == len(entries)


@pytest.mark.parametrize("method", METHODS)
def test_each_step_trains_on_k_whole_groups(on_one_rank, method):
    """The trained groups have an advantage wherever a generated one has.

    They have G rollouts, unless the method shares K*G among its prompts.
    """
    entries = list(read(on_one_rank / method / "ledger.jsonl"))
    for step in range(summary(on_one_rank / method)["steps"]):
        paid = [e for e in entries if e.step == step and e.purpose == "train"]
        trained = Counter(e.prompt_id for e in paid if e.trained)
        generated = Counter(e.prompt_id for e in paid)
        assert len(trained) == K and all(generated[p] == n for p, n in trained.items())
        shares = METHODS[method].shares_budget
        assert len(paid) == K * G if shares else set(trained.values()) == {G}
        assert all((e.weight is not None) == e.trained for e in paid)
        useful = {e.prompt_id for e in paid if not e.zero_variance}
        assert len(useful & set(trained)) == min(K, len(useful))


@pytest.mark.parametrize("method", METHODS)
def test_methods_pay_for_what_they_are_to_pay(on_one_rank, method):
    """Groups per step: K; K to P for `dapo`, `greso`, `hive`; the oracle probes all P."""
    steps = metrics(on_one_rank / method)
    entries = list(read(on_one_rank / method / "ledger.jsonl"))
    probes = sum(entry.purpose == "probe" for entry in entries)
    assert probes == (P * G * len(steps) if method == "oracle" else 0)
    for step in steps:
        paid = step["selection/groups_paid"]
        assert K <= paid <= P if METHODS[method].refills else paid == K


def test_dynamic_sampling_outlives_steps_without_any_advantage(on_one_rank):
    """Completions of one token never pass: all candidates are generated, in 4 rounds, 3 times."""
    directory = on_one_rank / "hopeless"
    entries = list(read(directory / "ledger.jsonl"))
    assert len(entries) == summary(directory)["rollouts"] == 3 * P * G
    assert all(entry.zero_variance and entry.reward == 0 for entry in entries)
    assert sum(entry.trained for entry in entries) == 3 * K * G
    for step in metrics(directory):
        assert (step["selection/groups_paid"], step["selection/rounds"]) == (P, P // K)
        assert step["loss/grad_norm"] == 0


@pytest.mark.parametrize("method", ON_TWO_RANKS)
def test_two_ranks_choose_what_one_chooses(on_one_rank, on_two_ranks, method):
    """Both ranks choose alike, or the run would fail; and an additional rank changes no choice."""
    one, two = (
        [(e.step, e.prompt_id, e.sample, e.reward) for e in read(root / method / "ledger.jsonl")]
        for root in (on_one_rank, on_two_ranks)
    )
    shared = min(len(one), len(two))
    assert summary(on_two_ranks / method)["ranks"] == 2 and shared >= BUDGET
    assert one[:shared] == two[:shared]
