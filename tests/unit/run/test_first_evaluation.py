"""The evaluation before the first step: left out, or made once however often a run is started."""

import json
from types import SimpleNamespace

import pytest
import torch
from rounding import approx

from megatron_prepo.evaluation.held_out import Evaluation
from megatron_prepo.run import directory as run_directory
from megatron_prepo.run import summary
from megatron_prepo.run.recorder import FIRST_EVALUATION, Run
from megatron_prepo.trainer.setup import Trainer
from tests.unit.run.test_run import ENTRY, METRICS
from tests.unit.run.test_run_directory import config, files  # noqa: F401 - a fixture


@pytest.fixture
def start(tmp_path):
    """Start the run, or start it again as after a kill, from the beginning."""
    begun = []

    def start(**evaluation) -> Run:
        settings = config(
            tmp_path,
            eval={"samples_per_prompt": 2, "samples_during": 1, **evaluation},
            train={"total_steps": 3},
            texts={"evaluations": 1},
        )
        if begun:
            run_directory.end(begun[-1].directory)
        run_directory.begin(settings, print)
        begun.append(Run(settings, rank=0))
        begun[-1].restart()
        return begun[-1]

    yield start
    run_directory.end(begun[-1].directory)


def first_step(run: Run, passes: list[float]) -> list[str]:
    """Go to the first step as the loop does, and return which evaluations were made."""
    made = []

    def evaluate(when: str, samples: int) -> Evaluation:
        made.append(when)
        found = Evaluation(torch.tensor(passes, dtype=torch.float64), samples)
        run.evaluate(lambda **_: found, when, run.num_steps, samples)
        run.keep("evaluations", lambda: {"step": run.num_steps, "when": when, "prompts": []})
        return found

    trainer = SimpleNamespace(config=run.config, run=run, evaluate=evaluate)
    steps = Trainer.steps(trainer)
    assert next(steps) == 0
    steps.close()
    return made


def test_it_is_kept_when_the_run_is_killed_before_its_first_checkpoint(start):
    run = start()
    assert first_step(run, [0.5, 1.0]) == ["before"]
    run.record(0, [ENTRY], METRICS)
    lines = (run.directory / "evaluations.jsonl").read_bytes()
    again = start()
    assert again.num_steps == 0 and (run.directory / "metrics.jsonl").read_bytes() == b""
    assert first_step(again, [0.0, 0.0]) == []
    assert again.before.pass_rate == 0.75 and again.before.samples_per_prompt == 2
    assert (run.directory / "evaluations.jsonl").read_bytes() == lines
    [text] = (run.directory / "texts" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(text)["when"] == "before"


@pytest.mark.parametrize(
    "evaluation",
    [{"samples_per_prompt": 4}, {"temperature": 0.5}, {"max_prompts": 1}, {"pass_at": [2]}],
)
def test_it_is_repeated_with_other_settings(start, evaluation):
    assert first_step(start(), [0.5, 1.0]) == ["before"]
    again = start(**evaluation)
    assert again.before is None
    assert first_step(again, [0.5, 0.5]) == ["before"]
    assert first_step(start(**evaluation, every=2), [0.0, 0.0]) == []


@pytest.mark.parametrize("damage", ["{", "{}", '{"eval": {}, "run": 1}', "another run's"])
def test_what_another_wrote_is_not_restored(start, damage):
    run = start()
    first_step(run, [0.5, 1.0])
    path = run.directory / FIRST_EVALUATION
    if damage == "another run's":
        damage = path.read_text().replace(run.identity, "a1")
    path.write_text(damage)
    assert first_step(start(), [0.25, 0.25]) == ["before"]
    assert len((run.directory / "evaluations.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("lines", [None, "", "cut", json.dumps({"step": 1, "x": 99 * "x"}) + "\n"])
def test_it_is_repeated_if_its_line_is_lost(start, capsys, lines):
    run = start()
    first_step(run, [0.5, 1.0])
    path = run.directory / "evaluations.jsonl"
    if lines is None:
        path.unlink()
    else:
        path.write_text(path.read_text()[:-9] if lines == "cut" else lines)
    assert first_step(start(), [0.25, 0.25]) == ["before"]
    assert "or not for evaluations.jsonl; the evaluation is repeated" in capsys.readouterr().err
    assert json.loads(path.read_text())["pass_rate"] == 0.25
    assert first_step(start(), [0.0, 0.0]) == []


def test_it_is_not_restored_where_none_is_wanted(start):
    run = start()
    first_step(run, [0.5, 1.0])
    again = start(before=False)
    assert again.before is None and first_step(again, []) == []
    assert (run.directory / "evaluations.jsonl").read_bytes() == b""
    assert first_step(start(), [0.5, 0.5]) == ["before"]


def test_without_it_a_run_has_no_gain(start):
    run = start(before=False)
    assert first_step(run, []) == []
    assert not (run.directory / FIRST_EVALUATION).exists()
    run.record(0, [ENTRY], METRICS)
    after = Evaluation(torch.tensor([0.5, 1.0], dtype=torch.float64), samples_per_prompt=2)
    run.evaluate(lambda **_: after, "after", 1, samples=2)
    state = json.loads(json.dumps(run.state_dict()))
    assert state["before"] is None
    made = run.finish(after, ranks=1)
    assert (made["pass_rate_before"], made["gain"], made["gain_ci95"]) == (None, None, None)
    assert made["pass_rate_after"] == approx(0.75)
    assert summary.text(made).count("not measured: eval.before=false") == 2
    assert (run.directory / "pass_rate.png").is_file()


def test_a_resumed_run_is_not_evaluated_as_if_it_had_made_no_step(start):
    run = start(before=False)
    run.num_steps = 1
    trainer = SimpleNamespace(config=start().config, run=run, evaluate=pytest.fail)
    steps = Trainer.steps(trainer)
    assert next(steps) == 1
    steps.close()
