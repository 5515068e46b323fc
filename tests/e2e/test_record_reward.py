"""A reward of the whole record, in training and evaluation, for prompts without answers."""

import json

import pytest
from rounding import approx

from megatron_prepo.cli import main
from tests.e2e.laptop import LAPTOP, SHORT, metrics, train

REWARD = """
def graded(completion, *, record, num_tokens, finished):
    right = completion.partition("####")[2].split() == list(record["secret"]["digits"])
    return {"reward": right * finished, "tokens": num_tokens, "finished": finished}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("record")
    (root / "reward.py").write_text(REWARD)
    given = [f"reward.function={root / 'reward.py'}:graded", "parallel.tensor=1"]
    for name in ("train", "eval"):
        lines = map(json.loads, (LAPTOP / f"{name}.jsonl").read_text().splitlines())
        records = [
            {"prompt": line["prompt"], "secret": {"digits": line["answer"]}} for line in lines
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (root / f"{name}.jsonl").write_text(text)
        given.append(f"data.{name}={root / name}.jsonl")
    assert train(root / "run", *SHORT, *given) == 0
    return root / "run"


def test_its_numbers_are_metrics(run):
    for step in metrics(run):
        assert step["reward/failed_ratio"] == 0.0 < step["reward/mean"]
        assert step["reward/tokens"] == approx(step["rollout/length"])
        assert step["reward/finished"] == step["rollout/finished_ratio"]


def test_an_evaluation_grades_the_same_and_keeps_them(run, tmp_path):
    assert main(["evaluate", "--model", f"m={run}", "--out", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out" / "completions").rglob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(record["metrics"]["tokens"] == record["tokens"] for record in records)
    summary = json.loads((run / "summary.json").read_text())
    passed = sum(record["reward"] == 1.0 for record in records) / len(records)
    assert passed == approx(summary["pass_rate_after"])


def test_a_reward_that_takes_the_answer_refuses_these_prompts(run, tmp_path, capsys):
    data = [f"data.{name}={run.parent / name}.jsonl" for name in ("train", "eval")]
    assert train(tmp_path / "run", *SHORT, *data) == 2
    assert "train.jsonl, line 1: field `answer` is missing" in capsys.readouterr().err
