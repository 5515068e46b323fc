"""The files of texts: only those asked for, with the lines up to where a run resumes."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_prepo.config import TextsConfig
from megatron_prepo.run import directory as run_directory
from megatron_prepo.run.recorder import Run
from megatron_prepo.run.texts import TextFiles, file_name
from tests.unit.run.test_run import ENTRY, METRICS
from tests.unit.run.test_run_directory import config, files  # noqa: F401 - a fixture


@pytest.fixture
def begin(tmp_path):
    """Begin or resume the run with these settings of `texts`."""
    begun = []

    def begin(**texts) -> Run:
        settings = config(tmp_path, texts=texts, train={"total_steps": 9})
        if begun:
            run_directory.end(begun[-1].directory)
        run_directory.begin(settings, print)
        begun.append(Run(settings, rank=0))
        return begun[-1]

    yield begin
    run_directory.end(begun[-1].directory)


def steps(directory: Path) -> list[int]:
    lines = (directory / file_name("rollouts")).read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def make_steps(run: Run, first: int, last: int) -> None:
    for step in range(first, last):
        run.metrics.write(step, METRICS)
        run.ledger.append([ENTRY])
        if run.config.texts.rollouts != 0:
            run.keep("rollouts", lambda step=step: {"step": step, "prompts": []})


def test_nothing_is_written_unless_it_is_asked_for(begin):
    run = begin()
    assert not (run.directory / "texts").exists()
    assert set(run.state_dict()["files"]) == {"ledger.jsonl", "metrics.jsonl", "evaluations.jsonl"}


def test_a_resumed_run_has_each_step_once(begin):
    run = begin(rollouts=2)
    make_steps(run, 0, 3)
    saved = run.state_dict()
    make_steps(run, 3, 5)  # which no checkpoint has
    with open(run.directory / file_name("rollouts"), "a") as file:
        file.write('{"step": 5, "pro')  # the process was killed
    again = begin(rollouts=2)
    again.load_state_dict(saved)
    make_steps(again, 3, 6)
    assert steps(again.directory) == [0, 1, 2, 3, 4, 5]


def test_steps_of_a_lost_future_are_removed_also_by_a_run_that_keeps_none(begin):
    run = begin(rollouts=None)
    make_steps(run, 0, 2)
    saved = run.state_dict()
    make_steps(run, 2, 4)
    silent = begin()
    silent.load_state_dict(saved)
    make_steps(silent, 2, 3)
    assert steps(silent.directory) == [0, 1]
    later = begin(rollouts=1)
    later.load_state_dict(silent.state_dict())
    make_steps(later, 3, 4)
    assert steps(later.directory) == [0, 1, 3]


def test_texts_may_be_removed_and_first_kept_later(begin):
    run = begin(rollouts=1)
    make_steps(run, 0, 2)
    saved = run.state_dict()
    shutil.rmtree(run.directory / "texts")
    again = begin(rollouts=1, evaluations=1)
    again.load_state_dict(saved)
    make_steps(again, 2, 3)
    assert steps(again.directory) == [2]


def test_a_run_from_the_beginning_keeps_none_of_before(begin):
    make_steps(begin(rollouts=1), 0, 2)
    again = begin(rollouts=1)
    again.truncate_logs({})
    assert steps(again.directory) == []


def test_half_a_surrogate_pair_is_written(tmp_path):
    texts = TextFiles(tmp_path, TextsConfig(evaluations=1))
    texts.append("evaluations", {"text": "\ud800"})
    texts.close()
    [line] = (tmp_path / file_name("evaluations")).read_text().splitlines()
    assert json.loads(line) == {"text": "\ud800"}
