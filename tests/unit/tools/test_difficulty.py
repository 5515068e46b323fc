"""The correlation of a prompt's scores with its pass rate: statistics, and a small run."""

import json

import numpy as np
import pytest
from rounding import approx
from scipy import stats
from transformers_scores import judged

from megatron_prepo.errors import UserError
from megatron_prepo.records import ScoredSequence
from tests.e2e.laptop import LAPTOP
from tools.inspect import difficulty

BASE = LAPTOP / "base"
SUMS = 20_000
"""Operations in the correlations of 200 prompts: some hundred for each."""


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(difficulty, "DRAWS", 50)


@pytest.fixture
def drawn():
    """A quantity, a pass rate that falls with it, and a length that moves both."""
    generator = np.random.default_rng(1)
    length_P = generator.integers(10, 60, 200).astype(float)
    x_P = length_P + generator.normal(0, 10, 200)
    pass_P = np.clip(1 - length_P / 60 + generator.normal(0, 0.1, 200), 0, 1).round(2)
    return x_P, pass_P, length_P


def test_rank_correlations_are_those_of_scipy_and_the_closed_form(drawn):
    x_P, pass_P, length_P = drawn
    pairs = [(x_P, pass_P), (x_P, length_P), (pass_P, length_P)]
    x_pass, x_length, pass_length = (stats.spearmanr(*pair).statistic for pair in pairs)
    assert difficulty.spearman(x_P, pass_P) == approx(x_pass, SUMS)
    partial = (x_pass - x_length * pass_length) / np.sqrt((1 - x_length**2) * (1 - pass_length**2))
    assert difficulty.spearman(x_P, pass_P, length_P) == approx(partial, SUMS)
    assert x_pass < -0.5 and abs(partial) < 0.2, "the length explains what they share"


def test_tasks_that_differ_hide_what_holds_within_them():
    """Simpson's paradox: within both tasks the pass rate falls, over all prompts it rises."""
    x_P = np.array([1.0, 2, 3, 11, 12, 13])
    pass_P = np.array([0.3, 0.2, 0.1, 0.9, 0.8, 0.7])
    task_P = np.array(["a"] * 3 + ["b"] * 3)
    assert difficulty.spearman(x_P, pass_P) > 0.5
    assert difficulty.within_tasks(task_P, x_P, pass_P) == approx(-1, SUMS)


def test_an_interval_has_the_value_in_it_and_none_where_nothing_varies(drawn):
    x_P, pass_P, length_P = drawn
    tasks = np.array(["a", "b"] * 100)
    found = difficulty.correlations(tasks, x_P, pass_P, length_P)
    assert set(found) >= {"all prompts", "within tasks", "length held fixed", "a", "b"}
    for row in found.values():
        assert row["ci95"][0] < row["value"] < row["ci95"][1]
    nothing = difficulty.correlations(tasks, x_P, np.zeros(200), length_P)
    assert all(row == {"value": None, "ci95": None} for row in nothing.values())


def test_a_task_of_which_too_few_prompts_pass_has_no_interval():
    """Expect (39/40)^40 = 36 % of the draws of 40 prompts to have no pass, and no correlation."""
    x_P, pass_P = np.arange(40.0), np.zeros(40)
    pass_P[7] = 1
    found = difficulty.with_ci95(40, lambda i: difficulty.spearman(x_P[i], pass_P[i]))
    assert found["value"] is not None and found["ci95"] is None


def test_what_the_length_explains_is_in_the_result(drawn):
    x_P, pass_P, length_P = drawn
    found = difficulty.of_length(
        np.array(["a"] * 200), length_P, {"pass rate": pass_P, "perplexity": x_P}
    )
    for name, of_name in (("pass rate", pass_P), ("perplexity", x_P)):
        expected = stats.spearmanr(length_P, of_name).statistic
        assert found[name]["all prompts"]["value"] == round(expected, 4)
        assert found[name]["within tasks"]["value"] == round(expected, 4)  # one task


def test_scores_are_those_of_transformers_and_all_is_written(tmp_path, capsys):
    lines = (LAPTOP / "train.jsonl").read_text().splitlines()[:12]
    records = [json.loads(line) for line in lines]
    prompts, completions = tmp_path / "prompts.jsonl", tmp_path / "completions.jsonl"
    tasks = ["add", "multiply"] * 6
    for record, task in zip(records, tasks, strict=True):
        record["id"] = f"{task}/{record['id']}"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    completions.write_text(
        "".join(
            json.dumps({"prompt": r["id"], "reward": float(n < k % 5)}) + "\n"
            for k, r in enumerate(records)
            for n in range(4)
        )
    )
    out = tmp_path / "difficulty.json"
    words = ["--hf", BASE, "--prompts", prompts, "--completions", completions, "--out", out]
    assert difficulty.main([str(word) for word in words]) == 0
    result = json.loads(out.read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert set(result["pass_rate"]) == {"all", "add", "multiply"}
    assert set(result["prompt length"]) == {"pass rate", "perplexity", "mean entropy"}
    assert result["pass_rate"]["all"] == round(sum(k % 5 for k in range(12)) / 48, 4)
    assert out.with_suffix(".png").stat().st_size > 10_000

    scored = difficulty.scores(str(BASE), [prompts])[str(prompts)]
    sequences = [ScoredSequence(prompt.tokens, 1) for prompt in scored.prompts]
    [(expected, allowed)] = judged(str(BASE), sequences, [1.0])
    for ppl, entropy, (logprobs_T, entropy_T) in zip(*scored[1:3], expected, strict=True):
        assert np.log(ppl) == pytest.approx(-float(logprobs_T.mean()), rel=0, abs=allowed)
        assert entropy == pytest.approx(float(entropy_T.mean()), rel=0, abs=allowed)


def test_a_prompt_without_completions_is_named(tmp_path):
    completions = tmp_path / "completions.jsonl"
    completions.write_text('{"prompt": "a", "reward": 1.0}\n')
    with pytest.raises(UserError, match="no completion of 1 prompts, such as 'b'"):
        difficulty.pass_rates(completions, ["a", "b"], 1.0)


def test_part_of_a_reward_is_no_pass(tmp_path):
    """Scorers may give a part to a right answer among other text."""
    completions = tmp_path / "tasks.jsonl"
    lines = [json.dumps({"prompt": "a", "reward": reward}) for reward in (1.0, 0.5, 0.0, 1.0)]
    completions.write_text("\n".join(lines) + "\n")
    assert difficulty.pass_rates(completions, ["a"], 1.0).tolist() == [0.5]
