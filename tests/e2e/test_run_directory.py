"""A user's directories are refused before anything is removed; runs move, grow, and run once."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rounding import approx

from megatron_prepo.cli import main
from megatron_prepo.compare import report_page as page
from megatron_prepo.debug import resume_check as prove
from megatron_prepo.errors import UserError
from megatron_prepo.files import lock, ownership
from tests.e2e.laptop import FILES, LAPTOP, REPOSITORY, SHORT, made_by_ranks

RUN = [*SHORT, "parallel.tensor=1", "train.total_steps=2"]
DEADLINE_SECONDS = 240.0
CONFIG = str(LAPTOP / "prepo.yaml")
EVALUATE = ["evaluate", "rollout.max_new_tokens=52", "--model", str(LAPTOP / "base")]
EVALUATE += ["--suite", f"s={LAPTOP / 'eval.jsonl'}"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Finished run of two steps that was begun by relative paths from another directory."""
    place = tmp_path_factory.mktemp("short")
    for name in ("base", "train.jsonl", "eval.jsonl"):
        copy = shutil.copytree if name == "base" else shutil.copyfile
        copy(LAPTOP / name, place / name)
    files = ["model.hf=./base", "data.train=train.jsonl", "data.eval=eval.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_prepo", "train", CONFIG, *RUN, "run.dir=run", *files],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def copied(tmp_path, short):
    """Copy of that run; its inputs have since moved."""
    shutil.copytree(short / "run", tmp_path / "run")
    return tmp_path / "run"


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != lock.FILE
    }


def refused(capsys, directory: Path, *words: str) -> str:
    """Return the error of a command, which must leave the directory unchanged."""
    before = content(directory)
    capsys.readouterr()
    assert main([*words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said.strip().splitlines()) == 1, said
    assert content(directory) == before
    return said


@pytest.fixture
def mine(tmp_path):
    """A user's directory, with names that a run has, too."""
    for name in ("checkpoints", "hf", "wandb", "tensorboard"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        (tmp_path / "mine" / name / "work").write_text("precious")
    return tmp_path / "mine"


# Nothing of the user's is removed


@pytest.mark.parametrize("overwrite", ["false", "true"])
@pytest.mark.parametrize("where", ["by name", "."])
def test_training_into_a_folder_of_the_users(capsys, monkeypatch, mine, where, overwrite):
    monkeypatch.chdir(mine)
    directory = mine if where == "by name" else where
    words = [f"run.dir={directory}", f"run.overwrite={overwrite}", *FILES, *RUN]
    said = refused(capsys, mine, "train", CONFIG, *words)
    assert "checkpoints" in said and "nothing was removed" in said


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_training_where_a_run_lost_its_config(capsys, copied, overwrite):
    (copied / "config.yaml").unlink()
    (copied / ownership.MARKER).unlink()
    words = [f"run.dir={copied}", f"run.overwrite={overwrite}", *FILES, *RUN]
    assert "nothing was removed" in refused(capsys, copied, "train", CONFIG, *words)


def test_training_from_a_model_within_the_runs_directory(capsys, tmp_path, copied):
    shutil.copytree(LAPTOP / "base", tmp_path / "base" / "hf")
    base = tmp_path / "base"
    words = [f"run.dir={base}", f"model.hf={base / 'hf'}", *FILES[1:], *RUN]
    assert "hf in it is not known" in refused(capsys, base, "train", CONFIG, *words)
    words = [f"run.dir={copied}", f"model.hf={copied / 'hf'}", "run.overwrite=true"]
    said = refused(capsys, copied, "train", CONFIG, *words, *FILES[1:], *RUN)
    assert f"model.hf={copied / 'hf'} is in the way" in said


def test_a_configuration_within_the_runs_directory(capsys, copied):
    words = ["train", str(copied / "config.yaml"), f"run.dir={copied}", "run.overwrite=true"]
    assert "copy it to another place" in refused(capsys, copied, *words)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["resume", "--prove", CONFIG, "--dir"], "--dir"),
        (["demo", "--dir"], "run.dir"),
        ([*EVALUATE, "--out"], "--out"),
    ],
)
def test_commands_with_a_directory_of_results(capsys, mine, command, option):
    (mine / "table.md").write_text("precious")
    said = refused(capsys, mine, *command, str(mine))
    assert option in said and ("nothing" in said)


def test_an_evaluation_that_is_none(capsys, mine):
    (mine / "evaluation.json").write_text('{"mine": 1}')
    said = refused(capsys, mine, *EVALUATE, "--out", str(mine))
    assert "is not the record of an evaluation" in said


def test_a_comparison_into_folders_of_the_users(capsys, tmp_path, mine):
    run = tmp_path / "runs" / "random" / "1"
    run.parent.mkdir(parents=True)
    mine.rename(run)
    words = ["compare", CONFIG, "--methods", "random", "--seeds", "1", "--dir", f"{tmp_path}/runs"]
    assert main([*words, *FILES, *RUN]) == 2
    said = capsys.readouterr().err
    assert f"run.dir={run} has no {ownership.MARKER}" in said
    assert (run / "hf" / "work").read_text() == "precious"


def test_a_report_over_a_file_of_the_users(capsys, copied, tmp_path):
    out = tmp_path / "page" / "report.html"
    out.parent.mkdir()
    out.write_text("precious")
    words = ["report", str(copied), "--out", str(out)]
    assert "no report wrote it" in refused(capsys, out.parent, *words)
    out.unlink()
    assert main(words) == 0
    assert list(out.parent.iterdir()) == [out]
    page._refuse_another_file(out)  # a later report replaces it
    assert main(words) == 0
    out.write_text("precious")
    assert f"{out} exists" in refused(capsys, out.parent, *words)


def test_a_table_that_the_user_wrote_more_to(tmp_path):
    table = tmp_path / "both.md"
    table.write_text("| arm | seeds |\n|---|---|\n| `random` | 2 |\n")
    page._refuse_another_file(table)
    for text in (table.read_text() + "\nMy analysis.\n", "# Notes\n" + table.read_text(), ""):
        table.write_text(text)
        with pytest.raises(UserError, match="no report wrote it"):
            page._refuse_another_file(table)


def test_users_files_in_folders_of_a_run(capsys, copied):
    for name in ("checkpoints/my_own/model", "hf/README.md"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("precious")
        words = [f"run.dir={copied}", "run.overwrite=true", *FILES, *RUN]
        said = refused(capsys, copied, "train", CONFIG, *words)
        assert name.removesuffix("/model") in said
        shutil.rmtree(copied / "checkpoints" / "my_own", ignore_errors=True)


# One at a time


def test_the_second_of_two_launchers_is_refused_by_name(capsys, tmp_path, copied):
    """The first launcher is still working; once killed, it does not block the second."""
    directory = tmp_path / "both"
    command = [sys.executable, "-m", "megatron_prepo", "train", CONFIG, f"run.dir={directory}"]
    settings = [*FILES, *RUN, "train.total_steps=1000", "checkpoint.every=1"]
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen([*command, *settings], cwd=REPOSITORY, stderr=log, stdout=log)
    try:
        wait_for_lines(1, directory / "metrics.jsonl", first)
        [rank] = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        for words in (
            ["train", CONFIG, f"run.dir={directory}", *settings],
            ["train", CONFIG, f"run.dir={directory}", *settings, "run.overwrite=true"],
            ["resume", str(directory)],
        ):
            capsys.readouterr()
            assert main(words) == 2
            said = capsys.readouterr().err
            assert f"in use by process {rank} on " in said and ", since 20" in said
    finally:
        first.kill()
        first.wait()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while os.path.exists(f"/proc/{rank}"):  # it ends with its launcher
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lock.refuse_if_held(directory / lock.FILE, "it")
    steps = [json.loads(s)["step"] for s in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    ledger = [json.loads(s) for s in (directory / "ledger.jsonl").read_text().splitlines()]
    keys = [(entry["step"], entry["prompt_id"], entry["sample"]) for entry in ledger]
    assert len(keys) == len(set(keys))


def test_a_live_run_whose_directory_is_taken_leaves_the_next_one_alone(tmp_path, short):
    """Two ranks lose their directory to a finished run, put in its place, which stays as it is."""
    directory, moved = tmp_path / "run", tmp_path / "moved"
    command = [sys.executable, "-m", "megatron_prepo", "train", CONFIG, f"run.dir={directory}"]
    shutil.copytree(short / "run", tmp_path / "next")
    settings = [*FILES, *RUN, "parallel.tensor=2", "train.total_steps=1000", "checkpoint.every=2"]
    live = subprocess.Popen(
        [*command, *settings], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for_lines(1, directory / "metrics.jsonl", live)
        directory.rename(moved)
        (tmp_path / "next").rename(directory)
        before = content(directory)
        _, said = live.communicate(timeout=DEADLINE_SECONDS)
    finally:
        live.kill()
        live.wait()
    assert live.returncode == 2, said
    assert f"error: run.dir={directory} was replaced by another directory" in said
    assert "while the run was using it" in said and "Traceback" not in said
    assert content(directory) == before
    assert prove.num_lines(moved / "metrics.jsonl") >= 1


def wait_for_lines(count: int, path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while prove.num_lines(path) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


# Runs that move and grow


def test_a_run_moves_and_is_extended_to_the_run_that_it_would_have_been(
    capfd, tmp_path, short, copied
):
    """The run is continued from another directory, with its inputs elsewhere, for one more step
    than it had; it is compared with a run that has the final settings from the beginning."""
    moved = tmp_path / "moved"
    shutil.copytree(short / "base", moved / "base")
    for name in ("train.jsonl", "eval.jsonl"):
        shutil.copyfile(short / name, moved / f"other_{name}")
    paths = [f"model.hf={moved / 'base'}", f"data.train={moved / 'other_train.jsonl'}"]
    paths.append(f"data.eval={moved / 'other_eval.jsonl'}")
    assert main(["resume", str(copied)]) == 2
    assert "finished run of 2 steps; extend it by a larger" in capfd.readouterr().err
    changed = ["eval.every=1", "checkpoint.keep_last=1", "run.tensorboard=true"]
    assert main(["resume", str(copied), *paths, "train.total_steps=3", *changed]) == 0
    said = capfd.readouterr().err
    assert "the content is the same" in said and "travels for 2 steps" in said
    assert (copied / "summary_step_2.json").exists()
    schedule = ["selection.horizon=2", "optimizer.lr_decay_steps=2", "train.total_steps=3"]
    whole = made_by_ranks(tmp_path / "whole", *RUN, *schedule)
    checks = [c for c in prove.compare(whole, copied) if not c.what.startswith("evaluations")]
    assert all(check.equal for check in checks), prove.text(checks)
    saved = yaml.safe_load((copied / "config.yaml").read_text())
    assert saved["run"]["dir"] == str(copied) and saved["model"]["hf"] == str(moved / "base")
    evaluated = [json.loads(s) for s in (copied / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluated] == [0, 2, 3]
    assert_on_tensorboard(copied, evaluated)


def assert_on_tensorboard(run: Path, evaluated: list[dict]) -> None:
    """Assert that TensorBoard has the evaluations that were made since it was enabled."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("eval/pass_rate")]
    single = torch.float32  # of TensorBoard's files
    rates = [(line["step"], approx(line["pass_rate"], 1, dtype=single)) for line in evaluated[1:]]
    assert shown == rates
    assert [event.step for event in events.Scalars("reward/mean")] == [2]


def test_inputs_that_changed_are_refused_by_name(capsys, tmp_path, copied):
    """The advice is not to overwrite."""
    changed = tmp_path / "train.jsonl"
    lines = (LAPTOP / "train.jsonl").read_text().splitlines(keepends=True)
    changed.write_text("".join(lines[:-1]))
    words = ["resume", str(copied), "train.total_steps=3", *FILES, f"data.train={changed}"]
    said = refused(capsys, copied, *words)
    assert f"the content of data.train={changed} is not what the run began with" in said
    assert "choose another run.dir" in said
