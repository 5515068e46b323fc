"""Prompt files made of reasoning-gym's tasks: mixtures, splits, ids, and errors by name."""

import json
import sys

import pytest

from megatron_prepo.data import read_records
from tests.allowed_skips import no_reasoning_gym
from tools.data.prepare import main

needs_the_library = pytest.mark.skipif(no_reasoning_gym(), reason="reasoning-gym is not installed")
SUMS = "chain_sum@2:min_terms=2,max_terms=2,min_digits=1,max_digits=2"


def prepare(out, *words: str) -> int:
    return main(["reasoning-gym", "--out", str(out), *words])


def records(file) -> list[dict]:
    return [json.loads(record.line) for record in read_records(file, needs_answer=False)]


@needs_the_library
def test_a_mixture_is_written_in_proportion_and_disjoint(tmp_path, capsys):
    words = ["--dataset", SUMS, "--dataset", "gcd:max_value=60", "--train", "30"]
    assert prepare(tmp_path, *words, "--held-out", "9", "--instruction", "Only the number.") == 0
    train, held_out = (records(tmp_path / f"{split}.jsonl") for split in ("train", "held_out"))
    kinds = [line["reasoning_gym"]["dataset"] for line in train]
    assert (kinds.count("chain_sum"), kinds.count("gcd"), len(held_out)) == (20, 10, 9)
    assert "gcd" in kinds[:12] and "chain_sum" in kinds[:12]  # mixed
    questions = [line["prompt"] for line in (*train, *held_out)]
    assert len(set(questions)) == 39 and all(q.endswith("\nOnly the number.") for q in questions)
    sums = next(line for line in train if line["id"].startswith("chain_sum/"))
    parameters = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    assert sums["reasoning_gym"]["parameters"] == parameters
    assert sums["reasoning_gym"]["entry"]["answer"] == sums["answer"]
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert statistics["library"] == f"reasoning-gym {sums['reasoning_gym']['version']}"
    assert [d["train"] for d in statistics["datasets"]] == [20, 10]


@needs_the_library
def test_more_tasks_leave_the_held_out_ones_and_the_ids(tmp_path, capsys):
    for name, number, other in (("a", "20", []), ("b", "40", ["--dataset", "lcm@0.001"])):
        words = ["--dataset", SUMS, *other, "--train", number, "--held-out", "10", "--seed", "3"]
        assert prepare(tmp_path / name, *words) == 0
    a, b = tmp_path / "a", tmp_path / "b"
    assert (a / "held_out.jsonl").read_text() == (b / "held_out.jsonl").read_text()
    assert set(map(str, records(a / "train.jsonl"))) <= set(map(str, records(b / "train.jsonl")))
    before = (a / "train.jsonl").read_text()
    assert prepare(a, "--dataset", SUMS, "--train", "20", "--seed", "4") == 0
    assert (a / "train.jsonl").read_text() != before


@needs_the_library
def test_a_level_of_the_curriculum_sets_what_is_not_given(tmp_path, capsys):
    words = ["--dataset", "chain_sum:max_terms=9", "--curriculum", "2", "--train", "2"]
    assert prepare(tmp_path, *words) == 0
    parameters = records(tmp_path / "train.jsonl")[0]["reasoning_gym"]["parameters"]
    from reasoning_gym.factory import create_curriculum

    curriculum = create_curriculum("chain_sum")
    curriculum.set_global_level(2)
    theirs = curriculum.generate_configuration()
    assert parameters["max_terms"] == 9 and parameters["max_digits"] == theirs.max_digits


@needs_the_library
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "chain_sums"], "no dataset 'chain_sums' (did you mean chain_sum?)"),
        (["--dataset", "composite"], "no dataset 'composite'"),
        (["--dataset", "gcd:max_valu=3"], "no parameter 'max_valu' (did you mean max_value?)"),
        (["--dataset", "gcd:seed=3"], "no parameter 'seed'"),
        (["--dataset", "gcd:3"], "'3' must have the form PARAMETER=VALUE"),
        (["--dataset", "gcd:min_numbers=0"], "gcd refuses {'min_numbers': 0}: "),
        (["--dataset", "gcd@0"], "the weight '0' must be a positive number"),
        (["--dataset", "gcd@x"], "the weight 'x' must be a positive number"),
        (["--dataset", "gcd", "--train", "0"], "--train 0 must be at least 1"),
        (["--dataset", "acre", "--curriculum", "1"], "reasoning-gym has no curriculum of acre"),
        (["--dataset", "gcd", "--curriculum", "99"], "the levels of gcd are 0 to "),
        (
            ["--dataset", "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"],
            "has too few different questions: ",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, capsys, words, message):
    assert prepare(tmp_path / "out", "--train", "500", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@needs_the_library
def test_a_file_of_someone_else_is_not_replaced(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("mine")
    assert prepare(tmp_path, "--dataset", "gcd", "--train", "2") == 2
    assert "train.jsonl exists" in capsys.readouterr().err
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_without_the_library_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "megatron_prepo.rewards.reasoning_gym", raising=False)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert prepare(tmp_path, "--dataset", "gcd", "--train", "2") == 2
    error = capsys.readouterr().err
    assert 'pip install -e ".[tasks]"' in error and error.count("\n") == 1
