"""Several held-out files by name: read, checked, compared on resume, and evaluated one by one."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rounding import approx

from megatron_prepo import config as configuration
from megatron_prepo.errors import UserError
from megatron_prepo.evaluation import suites
from megatron_prepo.evaluation.held_out import Evaluation, pooled, shared
from megatron_prepo.files import lock, ownership
from megatron_prepo.inputs import digests, preflight
from megatron_prepo.plan import run_length
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.run import changes, opening, summary
from megatron_prepo.run import directory as run_directory
from megatron_prepo.run.recorder import Run
from megatron_prepo.trainer.setup import Trainer

LAPTOP = Path(__file__).resolve().parents[3] / "examples" / "laptop"


@pytest.fixture
def files(tmp_path):
    """Two held-out files with the same ids."""
    lines = (LAPTOP / "eval.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "easy.jsonl").write_text("".join(lines[:6]))
    (tmp_path / "hard.jsonl").write_text("".join(lines[:3]))
    return tmp_path


def load(files, *overrides):
    sets = f"data.eval={{easy: {files}/easy.jsonl, hard: {files}/hard.jsonl}}"
    local = [f"model.hf={LAPTOP / 'base'}", f"data.train={LAPTOP / 'train.jsonl'}"]
    return configuration.load(
        LAPTOP / "prepo.yaml", [*local, f"run.dir={files / 'run'}", sets, *overrides]
    )


def test_a_mapping_is_read_expanded_saved_and_read_again(files, monkeypatch):
    monkeypatch.setenv("WHERE", str(files))
    config = load(files, "data.eval={b: $WHERE/x$$.jsonl, a: 5.jsonl}", "data.eval.c=~/y")
    expected = {"b": f"{files}/x$.jsonl", "a": "5.jsonl", "c": str(Path.home() / "y")}
    assert config.data.eval == expected and list(config.data.eval) == ["b", "a", "c"]
    (files / "saved.yaml").write_text(configuration.to_yaml(config))
    assert configuration.load(files / "saved.yaml").data == config.data
    saved = run_directory.with_absolute_paths(config).data.eval_files
    assert saved["a"] == str(Path("5.jsonl").absolute())


@pytest.mark.parametrize("sets", ["{}", "{a/b: x}", "{'': x}", "{a.b: x}"])
def test_names_that_no_metric_could_have_are_errors(files, sets):
    with pytest.raises(UserError, match=r"data\.eval=.* must be a file, or a mapping of names"):
        load(files, f"data.eval={sets}")


def test_each_set_is_read_checked_and_limited(files):
    inputs = preflight.check(load(files, "eval.max_prompts=4"))
    assert {name: len(of_set) for name, of_set in inputs.eval_sets.items()} == {
        "easy": 4,
        "hard": 3,
    }
    assert list(inputs.digests.files) == ["data.train", "data.eval.easy", "data.eval.hard"]
    config = load(files)
    shown = opening.prompts(config.data, inputs.train_prompts, inputs.eval_sets, {})
    assert f"held out easy 4 of {files}/easy.jsonl, hard 3 of" in shown
    assert run_length.eval_prompts(config) == 9
    assert [name for name, _ in suites.held_out(config.data)] == ["easy", "hard"]
    (files / "hard.jsonl").unlink()
    with pytest.raises(UserError, match=r"no such file or folder: data\.eval\.hard="):
        preflight.check(load(files))


def test_a_resumed_run_has_the_same_sets(files):
    config, read_before = load(files), digests.digests(load(files))

    def compare(now):
        return changes.compare_inputs(config, now, read_before, initial_weights=True)

    assert compare(config) == ([], [])
    (files / "hard.jsonl").rename(files / "moved.jsonl")
    moved = load(files, f"data.eval.hard={files}/moved.jsonl")
    assert compare(moved) == ([], [f"data.eval.hard={files}/hard.jsonl, now {files}/moved.jsonl"])
    forbidden, _ = compare(load(files, f"data.eval={files}/easy.jsonl"))
    assert [reason.partition("=")[0] for reason in forbidden] == [
        "data.eval.easy",
        "data.eval.hard",
        "data.eval",
    ]
    (files / "easy.jsonl").write_text("other\n")
    [changed], _ = compare(moved)
    assert "the content of data.eval.easy=" in changed


def evaluation(samples=4, **shares):
    sets = {name: torch.tensor(passes).double() for name, passes in shares.items()}
    return pooled({name: Evaluation(passes_P, samples) for name, passes_P in sets.items()})


def test_a_set_is_evaluated_as_if_it_were_the_only_one(files):
    """With the same ids and random numbers; the run's pass rate is that of all prompts together."""
    config, asked, shown = load(files), [], []
    sets = {
        name: [Prompt(str(i), "", "", (5, 6), (0, 2)) for i in range(count)]
        for name, count in (("easy", 3), ("hard", 1))
    }

    def generate(request):
        asked.append(request)
        request.on_progress(1, 2)
        return [Rollout(prompt, (7,), (-1.0,), "", True, 0) for prompt, _ in request.samples()]

    grades = iter([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 1.0]])
    trainer = SimpleNamespace(
        config=config,
        inputs=SimpleNamespace(eval_sets=sets),
        engine=SimpleNamespace(generate=generate),
        grader=SimpleNamespace(grade=lambda rollouts: [Grade(r) for r in next(grades)]),
        run=SimpleNamespace(
            num_steps=0,
            evaluate=lambda held_out, *_: held_out(lambda *progress: shown.append(progress)),
        ),
    )
    trainer._evaluate_set = lambda *arguments: Trainer._evaluate_set(trainer, *arguments)
    found = Trainer.evaluate(trainer, "before", 2)
    assert [request.prompts for request in asked] == list(sets.values())
    assert len({request.seed for request in asked}) == 1
    assert shown == [(0, 8), (1, 8), (6, 8), (7, 8)]
    assert {name: of_set.pass_rate for name, of_set in found.sets().items()} == {
        "easy": 0.5,
        "hard": 1.0,
    }
    assert found.pass_rate == approx((3 * 0.5 + 1.0) / 4)


def test_evaluations_with_more_prompts_share_the_first_of_each_set():
    before = evaluation(a=[0.0, 1.0, 0.5], b=[0.25])
    after = evaluation(a=[1.0, 0.5], b=[0.75, 0.0, 0.0])
    first, last = shared(before, after)
    assert (first.passes_P.tolist(), last.passes_P.tolist()) == ([0, 1, 0.25], [1, 0.5, 0.75])
    assert dict(first.sizes) == dict(last.sizes) == {"a": 2, "b": 1}


def test_sets_are_in_the_records_of_a_run_and_its_summary(files, monkeypatch):
    monkeypatch.setattr("megatron_prepo.run.summary.plot", lambda *_: None)
    config = load(files, "eval.pass_at=[2]")
    directory = Path(config.run.dir)
    directory.mkdir()
    ownership.mark(directory, ownership.RUN, identity="a1")
    with lock.held(directory / lock.FILE, "it"):
        run, shown = Run(config, rank=0), []
        run.dashboards = SimpleNamespace(
            write=lambda step, values: shown.append(values),
            close=lambda picture: None,
        )
        before, after = evaluation(a=[0.0, 0.5], b=[0.5]), evaluation(a=[0.5, 1.0], b=[0.25])
        for found in (before, after):
            run.evaluate(lambda found=found, **_: found, "during", 0, samples=4)
        run.before = before
        state = json.loads(json.dumps(run.state_dict()))
        resumed = Run(config, rank=1)
        resumed.load_state_dict(state)
        assert dict(resumed.before.sizes) == {"a": 2, "b": 1}
        made = run.finish(after, ranks=1)
    lines = [json.loads(s) for s in (directory / "evaluations.jsonl").read_text().splitlines()]
    assert lines[1]["pass_rate"] == approx(1.75 / 3)
    assert lines[1]["sets"]["a"]["pass_rate"] == 0.75 and lines[1]["sets"]["b"]["prompts"] == 1
    assert shown[1]["eval/a/pass_rate"] == 0.75
    assert shown[1]["eval/b/pass_at_2"] == approx(0.5)
    assert made["sets"]["a"]["gain"] == 0.5 and made["sets"]["b"]["gain"] == -0.25
    assert made["gain"] == approx(0.25)
    text = summary.text(made | {"seconds": {}})
    assert "0.250 -> 0.750" in text and "0.500 -> 0.250" in text
