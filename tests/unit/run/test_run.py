"""A live run whose directory is taken away writes nothing into its replacement."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_prepo.errors import UserError
from megatron_prepo.evaluation.held_out import Evaluation
from megatron_prepo.files import lock, ownership
from megatron_prepo.run import dashboards
from megatron_prepo.run import directory as run_directory
from megatron_prepo.run.ledger import LedgerEntry
from megatron_prepo.run.recorder import Run
from tests.unit.run.test_run_directory import config, content, files  # noqa: F401 - a fixture

ENTRY = LedgerEntry(
    step=0,
    prompt_id="a",
    sample=0,
    selector="prepo",
    purpose="train",
    trained=True,
    ppl=1.5,
    reward=1.0,
    length=3,
    finished=True,
    mean_entropy=0.5,
    weight=1.0,
    zero_variance=False,
    weight_version=0,
)
METRICS = {"reward/mean": 0.5, "entropy/mean": 0.25}


@pytest.fixture
def live(tmp_path):
    """Run that has begun, with dashboards, and is in its first step."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    settings = config(tmp_path, run={"tensorboard": True})
    run_directory.begin(settings, pytest.fail)
    run = Run(settings, rank=0)
    steps = run.steps()
    next(steps)
    yield run
    steps.close()
    run_directory.end(Path(settings.run.dir))


def write_a_step(run: Run) -> None:
    """Write what a loop writes without the other ranks."""
    run.record(0, [ENTRY], METRICS)
    found = Evaluation(torch.tensor([0.5], dtype=torch.float64), samples_per_prompt=1)
    run.evaluate(lambda **_: found, "during", 1, samples=1)
    run.state_dict()


def begin_another(tmp_path, directory: Path) -> Run:
    """Begin another run of the same settings in the same place, in this process."""
    other = config(tmp_path, run={"dir": str(directory), "tensorboard": True})
    run_directory.begin(other, pytest.fail)
    return Run(other, rank=0)


def test_a_run_in_its_own_directory_writes(live):
    assert live.lost() is None
    live.check_directory()
    write_a_step(live)
    assert (live.directory / "ledger.jsonl").read_text().count("\n") == 1
    assert live.state_dict()["identity"] == ownership.marker(live.directory)["identity"]
    assert live.state_dict()["files"]["ledger.jsonl"] > 0


def test_the_summary_is_written_before_the_dashboards_get_their_last(live):
    write_a_step(live)
    seen = []

    def look(*_: object) -> None:
        seen.append((live.directory / "summary.json").is_file() and live.lost() is None)

    last = SimpleNamespace(write_picture=look, close=look)
    live.dashboards = dashboards.Dashboards({"It": last}, pytest.fail)
    live.finish(Evaluation(torch.tensor([0.5], dtype=torch.float64), samples_per_prompt=1), ranks=1)
    assert seen == [True, True]


def test_moved_away_and_another_run_in_its_place(tmp_path, live):
    live.directory.rename(tmp_path / "moved")
    other = begin_another(tmp_path, live.directory)
    before = content(live.directory)
    write_a_step(live)
    assert content(live.directory) == before
    with pytest.raises(UserError, match=r"run\.dir=.* while the run was using it; the run has st"):
        live.check_directory()
    live.before = Evaluation(torch.tensor([0.5], dtype=torch.float64), samples_per_prompt=1)
    with pytest.raises(UserError, match="while the run was using it"):
        live.finish(live.before, ranks=1)
    assert content(live.directory) == before
    assert other.lost() is None


def test_cutting_the_logs_is_of_the_runs_own_wherever_they_are(tmp_path, live):
    write_a_step(live)
    live.directory.rename(tmp_path / "moved")
    other = begin_another(tmp_path, live.directory)
    other.ledger.append([ENTRY])
    before = content(live.directory)
    live.truncate_logs({})
    assert content(live.directory) == before
    assert (tmp_path / "moved" / "ledger.jsonl").read_bytes() == b""


def remove(live: Run) -> None:
    shutil.rmtree(live.directory)


def empty(live: Run) -> None:
    remove(live)
    live.directory.mkdir()


def copy(live: Run) -> None:
    """Copy the directory, as `mv` does between two disks: a new directory, the same identity."""
    moved = live.directory.with_name("moved")
    shutil.copytree(live.directory, moved)
    remove(live)
    shutil.copytree(moved, live.directory)


def swap_a_link(live: Run) -> None:
    """Replace the directory by a link to the copy."""
    copy(live)
    remove(live)
    live.directory.symlink_to(live.directory.with_name("moved"))


def replace_the_lock(live: Run) -> None:
    (live.directory / lock.FILE).unlink()
    (live.directory / lock.FILE).touch()


def remove_the_lock(live: Run) -> None:
    (live.directory / lock.FILE).unlink()


def replace_the_marker(live: Run) -> None:
    ownership.mark(live.directory, ownership.RUN, identity=ownership.new_identity())


def remove_the_marker(live: Run) -> None:
    (live.directory / ownership.MARKER).unlink()


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (remove, "was moved or removed"),
        (empty, "was replaced by another directory"),
        (copy, "was replaced by another directory"),
        (swap_a_link, "was replaced by another directory"),
        (replace_the_lock, f"or its {lock.FILE} was removed or replaced"),
        (remove_the_lock, f"or its {lock.FILE} was removed or replaced"),
        (replace_the_marker, f"has lost its {ownership.MARKER}, or has another run's"),
        (remove_the_marker, f"has lost its {ownership.MARKER}"),
    ],
)
def test_nothing_is_written_where_the_run_is_not_known_to_be(live, harm, what):
    harm(live)
    before = content(live.directory)
    write_a_step(live)
    assert content(live.directory) == before
    with pytest.raises(UserError, match=what):
        live.check_directory()


def test_a_link_to_where_it_was_moved_is_the_place_still(tmp_path, live):
    """The user makes room on a full disk: `mv run /large/run; ln -s /large/run run`."""
    live.directory.rename(tmp_path / "moved")
    live.directory.symlink_to(tmp_path / "moved")
    assert live.lost() is None


def test_all_ranks_raise_what_rank_zero_has_found(tmp_path, live):
    remove(live)
    found = UserError(live.lost())
    rank_one = Run(live.config, rank=1, share=lambda value: found)
    with pytest.raises(UserError, match="was moved or removed"):
        rank_one.check_directory()


@pytest.mark.parametrize("failing", [(os, "stat"), (Path, "read_bytes")])
def test_a_file_system_that_fails_takes_no_directory_away(live, monkeypatch, failing):
    """The error is raised unchanged, on all ranks, and the run can be restarted."""

    def fails(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "disk")

    monkeypatch.setattr(*failing, fails)
    with pytest.raises(OSError, match="disk"):
        live.check_directory()
    monkeypatch.undo()
    live.check_directory()


def test_an_error_of_the_disk_is_one_of_the_directory_if_that_is_gone(live):
    with pytest.raises(FileNotFoundError), live.lost_directory_named():
        os.stat(live.directory / "absent")
    remove(live)
    with pytest.raises(UserError, match="was moved or removed"), live.lost_directory_named():
        os.stat(live.directory / "absent")
    with pytest.raises(UserError), live.lost_directory_named((OSError, RuntimeError)):
        torch.save({}, live.directory / "absent")
