"""Tasks of reasoning-gym: its own scorer, its own answers, in a grading process."""

import json
import re
import sys

import pytest

from megatron_prepo.config import RewardConfig
from megatron_prepo.errors import UserError
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards import load
from megatron_prepo.rewards.pool import Grader
from tests.allowed_skips import no_reasoning_gym

needs_the_library = pytest.mark.skipif(no_reasoning_gym(), reason="reasoning-gym is not installed")

DATASETS = {
    "chain_sum": "min_terms=2,max_terms=3,min_digits=1,max_digits=2",
    "basic_arithmetic": "",
    "products": "",
    "gcd": "min_numbers=2,max_numbers=3",
    "lcm": "",
    "simple_equations": "",
    "letter_counting": "",
    "word_sorting": "transformation=uppercase",
    "time_intervals": 'max_date=2001-01-01,task_types=["date"]',
    "mini_sudoku": "",
    "countdown": "",
    "n_queens": "",
    "spiral_matrix": "",
    "polynomial_multiplication": "",
    "rearc": "",
    "number_sorting": "",
    "propositional_logic": "",
}
"""Datasets of every kind of scorer; the last one has no answers of its own."""


def lines(name: str, number: int = 3) -> list[dict]:
    from tools.data import reasoning_gym_tasks as tasks

    part = tasks.read_part(f"{name}:{DATASETS[name]}", None)
    return tasks.generate(part, "0/train", number, set())


def rollout(line: dict, text: str) -> Rollout:
    prompt = Prompt(line["id"], line["prompt"], "", (1, 2), (0, 2), json.dumps(line))
    return Rollout(prompt, (3,), (-0.5,), text, True, 0)


@pytest.fixture(scope="module")
def grader():
    grader = Grader(RewardConfig(function="reasoning_gym", processes=1, max_failed=1.0))
    yield grader
    grader.close()


@needs_the_library
@pytest.mark.parametrize("name", sorted(DATASETS.keys() - {"propositional_logic"}))
def test_the_librarys_answer_scores_1_and_another_less(grader, name):
    for line in lines(name):
        wrong = "no answer at all"
        texts = [line["answer"], f"So <answer>\n{line['answer']}\n</answer>.", wrong]
        right, tagged, less = grader.grade([rollout(line, text) for text in texts])
        assert right.outcome == tagged.outcome == less.outcome == "ok", right.reason
        assert right.reward == tagged.reward == 1.0 > less.reward
        assert right.metrics == {name: 1.0} and less.metrics == {name: less.reward}


@needs_the_library
def test_the_number_that_counts_is_the_last(grader):
    """This reproduces the first measurements on a pretrained model."""
    (line,) = lines("chain_sum", 1)
    number = line["answer"]
    texts = [f"It is 1 + 2 = {number}.", f"{number} is not 77", f"\\boxed{{{number}}}, not 77"]
    texts += [f"Answer: 77\nAnswer: {number} apples", "I do not know", ""]
    grades = grader.grade([rollout(line, text) for text in texts])
    assert [grade.reward == 1.0 for grade in grades] == [True, False, True, True, False, False]


@needs_the_library
def test_an_answer_to_a_task_without_one_is_judged(grader):
    (line,) = lines("propositional_logic", 1)
    assert "answer" not in line
    (grade,) = grader.grade([rollout(line, "nothing follows")])
    assert grade.outcome == "ok" and 0 <= grade.reward < 1


@needs_the_library
@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("spiral_matrix", "open({path}, {mode}) and []"),
        ("n_queens", "[open({path}, {mode})]"),
        ("countdown", "open({path}, {mode})"),
        ("polynomial_multiplication", "open({path}, {mode})"),
    ],
)
def test_an_answer_is_not_run(grader, tmp_path, monkeypatch, name, answer):
    """The library runs it."""
    from megatron_prepo.rewards.reasoning_gym import DATASETS

    written = tmp_path / "written"
    path, mode = ("+".join(f"chr({ord(c)})" for c in text) for text in (str(written), "w"))
    answer = answer.format(path=path, mode=mode)
    (line,) = lines(name, 1)
    (grade,) = grader.grade([rollout(line, answer)])
    assert grade.outcome == "ok" and grade.reward < 0.1 and not written.exists()
    dataset_class, config_class = DATASETS[name]
    monkeypatch.delitem(vars(sys.modules[dataset_class.__module__]), "eval", raising=False)
    entry = line["reasoning_gym"]["entry"]
    dataset_class(config_class()).score_answer(answer, entry)
    assert written.exists()


@needs_the_library
def test_a_list_scores_as_in_the_library(grader):
    (line,) = lines("spiral_matrix", 1)
    (grade,) = grader.grade([rollout(line, str(line["answer"].split()))])
    assert grade.reward == 0.1


@needs_the_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": "0.1.2"},
            "written by reasoning-gym 0.1.2, but .* install reasoning-gym==0.1.2",
        ),
        ({"dataset": "chain_sums"}, "KeyError: 'chain_sums'"),
        (None, "has no field `reasoning_gym`: tools/data/prepare.py reasoning-gym"),
    ],
)
def test_a_line_that_cannot_be_scored_is_an_error(grader, change, message):
    (line,) = lines("chain_sum", 1)
    task = line.pop("reasoning_gym")
    given = line if change is None else line | {"reasoning_gym": task | change}
    (grade,) = grader.grade([rollout(given, line["answer"])])
    assert grade.outcome == "error" and re.search(message, grade.reason)


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "megatron_prepo.rewards.reasoning_gym", raising=False)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        UserError, match=r'^reasoning_gym needs a package .*"\.\[tasks\]"$'
    ) as error:
        load("reasoning_gym")
    assert "\n" not in str(error.value)
