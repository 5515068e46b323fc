"""What a run keeps of a step and of an evaluation: the window, a sample, finite numbers."""

import json
import math

import torch
from rounding import approx

from megatron_prepo.actor.actor import Scores
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.selection.base import Candidates
from megatron_prepo.trainer.groups import Groups
from megatron_prepo.trainer.overlong import KEEP, Overlong
from megatron_prepo.trainer.policy_update import RolloutScores, TrainingBatch
from megatron_prepo.trainer.step_texts import evaluation_texts, rollout_texts
from tests.unit.rollout.test_pieces import Words

G = 2
ADVANTAGES = [[0.5, -0.5], [1.0, -1.0]]


def prompt(name: str) -> Prompt:
    return Prompt(id=name, text=f"what is {name}?", answer="7", tokens=(1, 2), content=(0, 2))


def rollout(of: Prompt, n: int) -> Rollout:
    tokens = tuple(range(n, n + 3))
    return Rollout(of, tokens, (-1.0,) * 3, f"text {n}", finished=n % 2 == 0, weight_version=0)


def step(
    ppl: list[float] | None,
    count: int | None = None,
    entropies=(0.25, 1.0 / 3, 2.0),
    overlong=KEEP,
):
    """Return the line of a step whose candidates 4, 0 and 2 were rolled out; 0 was dropped."""
    prompts = [prompt(name) for name in "abcde"]
    ppl_P = None if ppl is None else torch.tensor(ppl, dtype=torch.float64)
    chosen = (4, 0, 2)
    rollouts = [rollout(prompts[p], 10 * p + g) for p in chosen for g in range(G)]
    grades = [Grade(float(i % 2), "ok" if i else "timeout") for i in range(len(rollouts))]
    generated = Groups().extend(chosen, rollouts, grades)
    kept = [0, 1, 4, 5]
    groups = Groups(overlong=overlong).extend(
        (4, 2), [rollouts[i] for i in kept], [grades[i] for i in kept]
    )
    scores = [Scores(torch.zeros(3), torch.tensor(entropies)) for _ in kept]
    entropy_N = torch.stack([score.entropy_T.double().mean() for score in scores])
    old_scores = RolloutScores(scores, None, entropy_N, torch.full((4,), 3))
    batch = TrainingBatch(groups, torch.tensor(ADVANTAGES).flatten(), old_scores, torch.arange(4.0))
    return rollout_texts(Words(), 6, Candidates(prompts, ppl_P), generated, batch, count)


def test_the_window_is_by_perplexity_with_the_chosen_positions():
    line = step([3.0, 1.0, 2.0, 5.0, math.nan])
    assert line["step"] == 6
    assert line["ppl"] == [1.0, 2.0, 3.0, 5.0, None]
    assert line["chosen"] == [1, 2, 4]
    found = [(p["id"], p["position"], p["ppl"]) for p in line["prompts"]]
    assert found == [("e", 4, None), ("a", 2, 3.0), ("c", 1, 2.0)]
    assert json.loads(json.dumps(line, allow_nan=False)) == line


def test_a_rollout_has_its_numbers_and_its_tokens():
    line = step([1.0, 2.0, 3.0, 4.0, 5.0])
    first, second = line["prompts"][2]["rollouts"]
    assert line["prompts"][2]["text"] == "what is c?" and line["prompts"][2]["answer"] == "7"
    assert second == {
        "reward": 1.0,
        "graded": "ok",
        "tokens": 3,
        "finished": False,
        "text": "text 21",
        "aborted": False,
        "trained": True,
        "advantage": ADVANTAGES[1][1],
        "weight": 3.0,
        "mean_entropy": approx((0.25 + 1 / 3 + 2) / 3, dtype=torch.float32),
        "entropy": [0.25, 0.3333, 2.0],
        "pieces": ["w21", " w22", " w23"],
    }
    assert first["finished"] and line["prompts"][0]["rollouts"][0]["graded"] == "timeout"


def test_a_dropped_rollout_has_its_text_and_no_entropy():
    dropped = step([1.0, 2.0, 3.0, 4.0, 5.0])["prompts"][1]["rollouts"]
    for line in dropped:
        assert not line["trained"] and len(line["pieces"]) == 3
        assert [line[k] for k in ("advantage", "weight", "mean_entropy", "entropy")] == [None] * 4


def test_a_masked_rollout_is_not_trained_on_and_has_no_weight():
    """The second of each group did not finish; its group's advantages include it."""
    lines = step([1.0, 2.0, 3.0, 4.0, 5.0], overlong=Overlong("mask"))["prompts"][2]["rollouts"]
    assert [line["trained"] for line in lines] == [True, False]
    assert [line["weight"] for line in lines] == [2.0, None]
    assert [line["advantage"] for line in lines] == list(ADVANTAGES[1])


def test_without_perplexity_there_is_no_window():
    line = step(None)
    assert line["ppl"] is None and line["chosen"] is None
    assert all("position" not in prompt for prompt in line["prompts"])


def test_a_sample_is_spread_and_numbers_that_are_not_finite_are_null():
    line = step([1.0, 2.0, 3.0, 4.0, 5.0], count=2, entropies=(math.nan, math.inf, 1.0))
    assert [prompt["id"] for prompt in line["prompts"]] == ["e", "c"]
    assert line["prompts"][0]["rollouts"][0]["entropy"] == [None, None, 1.0]
    assert line["prompts"][0]["rollouts"][0]["mean_entropy"] is None


def test_an_evaluation_has_all_samples_of_its_prompts():
    prompts = [prompt(name) for name in "abc"]
    rollouts = [rollout(p, n) for n, p in enumerate(prompts) for _ in range(G)]
    grades = [Grade(float(n)) for n in range(len(rollouts))]
    graded = list(zip(rollouts, grades, strict=True))
    line = evaluation_texts(4, "during", {"held_out.jsonl": graded}, count=2)
    assert (line["step"], line["when"]) == (4, "during")
    assert [p["id"] for p in line["prompts"]] == ["a", "c"]
    assert [c["reward"] for c in line["prompts"][1]["completions"]] == [4.0, 5.0]
    assert line["prompts"][1]["completions"][0] == {
        "reward": 4.0,
        "graded": "ok",
        "tokens": 3,
        "finished": True,
        "text": "text 2",
    }


def test_prompts_of_several_sets_have_names_of_their_own():
    graded = [(rollout(prompt("a"), 0), Grade(1.0))]
    line = evaluation_texts(0, "before", {"easy": graded, "hard": graded}, count=None)
    assert [p["id"] for p in line["prompts"]] == ["easy/a", "hard/a"]
    assert [len(p["completions"]) for p in line["prompts"]] == [1, 1]
