"""Generated rollouts are found again, bit for bit, and only as what they were."""

import os
import shutil

import pytest

from megatron_prepo.errors import UserError
from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.run.rollout_journal import Journal

PROMPTS = [Prompt(name, "how many ?", "1", (3, 4), (0, 2), '{"n": 1}') for name in ("a", "b")]


def rollouts(version: int = 5, prompts=PROMPTS, samples=(0, 1)) -> dict[tuple[str, int], Rollout]:
    return {
        (prompt.id, sample): Rollout(
            prompt=prompt,
            tokens=(7, 8 + sample),
            engine_logprobs=(-0.1, -1 / 3),
            text="caf\u00e9 \ud800\n",
            finished=sample == 0,
            weight_version=version,
            aborted=sample == 1,
            routing=bytes([250, sample, 10]) if version == 6 else None,
        )
        for prompt in prompts
        for sample in samples
    }


def journal(directory, rank=0, share=lambda value: value) -> Journal:
    return Journal(directory, rank, share)


def test_rollouts_are_found_once_and_as_they_were(tmp_path):
    journal(tmp_path / "j").add("rollouts/3", rollouts())
    again = journal(tmp_path / "j")
    assert again.find("rollouts/3", 5, PROMPTS) == rollouts()
    assert again.find("rollouts/3", 5, PROMPTS) == {}


def test_a_later_round_of_a_step_finds_its_samples_of_the_same_prompts(tmp_path):
    """The first round takes sample 0 of each, and leaves the second round's."""
    journal(tmp_path / "j").add("rollouts/3", rollouts(samples=(0, 1, 2)))
    again = journal(tmp_path / "j")
    assert again.find("rollouts/3", 5, PROMPTS, [range(1)] * 2) == rollouts(samples=(0,))
    found = again.find("rollouts/3", 5, PROMPTS, [range(1, 3), range(1, 2)])
    assert found.keys() == {("a", 1), ("a", 2), ("b", 1)}
    assert again.find("rollouts/3", 5, PROMPTS).keys() == {("b", 2)}


def begun(directory, identity: str):
    """Return a run's directory."""
    directory.mkdir(exist_ok=True)
    ownership.mark(directory, ownership.RUN, identity=identity)
    return directory


def test_rollouts_of_another_run_are_not_taken(tmp_path, capsys):
    """The same prompt, step and weights' number; those of an older version have no identity."""
    run = begun(tmp_path / "run", "a1")
    journal(run / "j").add("rollouts/3", rollouts(samples=(0,)))
    begun(run, "b2")
    mine = journal(run / "j")
    assert "skipped 1 lines with another run's rollouts" in capsys.readouterr().err
    assert mine.find("rollouts/3", 5, PROMPTS) == {}
    mine.add("rollouts/3", rollouts(samples=(1,)))
    assert journal(run / "j").find("rollouts/3", 5, PROMPTS) == rollouts(samples=(1,))
    [path] = (run / "j").iterdir()
    path.write_text(path.read_text().replace('"run": "a1", ', ""))
    assert journal(run / "j").find("rollouts/3", 5, PROMPTS) == rollouts()


def test_lines_go_where_the_runs_directory_goes(tmp_path):
    """Nothing goes to the run that takes its place, at the same step with the same weights."""
    run = begun(tmp_path / "run", "a1")
    live = journal(run / "j")
    live.add("rollouts/3", rollouts(samples=(0,)))
    run.rename(tmp_path / "moved")
    other = journal(begun(run, "b2") / "j")
    live.add("rollouts/3", rollouts(samples=(1,)))
    live.force()
    assert list(run.iterdir()) == [run / ownership.MARKER]
    assert other.find("rollouts/3", 5, PROMPTS) == {}
    assert journal(tmp_path / "moved" / "j").find("rollouts/3", 5, PROMPTS) == rollouts()


@pytest.mark.parametrize("another", [False, True])
def test_nothing_is_written_where_the_runs_directory_was_removed(tmp_path, another):
    """No error is raised, which would leave other ranks waiting."""
    run = begun(tmp_path / "run", "a1")
    live = journal(run / "j")
    live.add("rollouts/3", rollouts(samples=(0,)))
    shutil.rmtree(run)
    if another:
        begun(run, "b2")
    live.add("rollouts/3", rollouts(samples=(1,)))
    live.force()
    left = [run / ownership.MARKER] if another else []
    assert list(run.iterdir() if another else tmp_path.iterdir()) == left


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "j").symlink_to(tmp_path / "absent")
    with pytest.raises(OSError):
        journal(tmp_path / "j").add("rollouts/3", rollouts())


def test_a_damaged_line_is_named(tmp_path):
    journal(tmp_path / "j").add("rollouts/3", rollouts())
    path = tmp_path / "j" / "rollouts_3.0.jsonl"
    path.write_bytes(path.read_bytes() + b"\0\0\n")
    with pytest.raises(UserError, match=r"rollouts_3\.0\.jsonl, line 2 is damaged"):
        journal(tmp_path / "j")


@pytest.mark.parametrize(
    ("purpose", "version", "prompts"),
    [
        ("rollouts/4", 5, PROMPTS),
        ("probes/3", 5, PROMPTS),
        ("rollouts/3", 6, PROMPTS),
        ("rollouts/3", 5, []),
        ("rollouts/3", 5, [Prompt("c", "", "", (3, 4), (0, 2))]),
    ],
)
def test_others_are_not_taken(tmp_path, purpose, version, prompts):
    journal(tmp_path / "j").add("rollouts/3", rollouts())
    assert journal(tmp_path / "j").find(purpose, version, prompts) == {}


def test_of_a_batch_that_was_under_way_what_had_come_is_found(tmp_path):
    """Rollouts are found in the order of arrival; next time, also those that arrived since."""
    first = journal(tmp_path / "j")
    first.add("rollouts/3", rollouts(prompts=PROMPTS[1:], samples=[1]))
    first.add("rollouts/3", rollouts(prompts=PROMPTS[:1], samples=[0]))
    again = journal(tmp_path / "j")
    assert again.find("rollouts/3", 5, PROMPTS).keys() == {("b", 1), ("a", 0)}
    again.add("rollouts/3", rollouts(samples=[1], prompts=PROMPTS[:1]))
    found = journal(tmp_path / "j").find("rollouts/3", 5, PROMPTS)
    assert found == {key: rollouts()[key] for key in [("b", 1), ("a", 0), ("a", 1)]}


def test_a_batch_with_routings_is_found_as_it_was(tmp_path):
    journal(tmp_path / "j").add("rollouts/3", rollouts(version=6))
    found = journal(tmp_path / "j").find("rollouts/3", 6, PROMPTS)
    assert found == rollouts(version=6) and found["a", 1].routing == b"\xfa\x01\n"


def test_rounds_of_a_step_are_told_apart(tmp_path):
    first = journal(tmp_path / "j")
    first.add("rollouts/3", rollouts())
    again = journal(tmp_path / "j")
    assert again.find("rollouts/3", 5, PROMPTS[1:]) == rollouts(prompts=PROMPTS[1:])
    assert again.find("rollouts/3", 5, PROMPTS) == rollouts(prompts=PROMPTS[:1])


@pytest.mark.parametrize("lost", [1, 10, 140])
def test_a_torn_last_line_is_nothing(tmp_path, lost):
    first = journal(tmp_path / "j")
    first.add("rollouts/3", rollouts(prompts=PROMPTS[:1]))
    first.add("rollouts/3", rollouts(prompts=PROMPTS[1:]))
    file = tmp_path / "j" / "rollouts_3.0.jsonl"
    file.write_bytes(file.read_bytes()[:-lost])
    again = journal(tmp_path / "j")
    assert again.find("rollouts/3", 5, PROMPTS) == rollouts(prompts=PROMPTS[:1])
    again.add("rollouts/3", rollouts(prompts=PROMPTS[1:]))
    assert journal(tmp_path / "j").find("rollouts/3", 5, PROMPTS) == rollouts()


def test_what_checkpoints_cover_is_forgotten(tmp_path):
    first = journal(tmp_path / "j")
    for step in (8, 9, 10, 11):
        for rank in (0, 1):
            journal(tmp_path / "j", rank, share=lambda value: []).add(
                f"rollouts/{step}", rollouts()
            )
    journal(tmp_path / "j", 1, share=lambda value: []).forget(before=99)
    first.forget(before=10)
    assert sorted(path.name for path in (tmp_path / "j").iterdir()) == [
        "rollouts_10.0.jsonl",
        "rollouts_10.1.jsonl",
        "rollouts_11.0.jsonl",
        "rollouts_11.1.jsonl",
    ]
    first.close()
    assert not (tmp_path / "j").exists()


def test_every_rank_finds_what_each_has_written(tmp_path):
    journal(tmp_path / "j").add("rollouts/3", rollouts(prompts=PROMPTS[:1]))
    journal(tmp_path / "j", 1, share=lambda value: []).add(
        "rollouts/3", rollouts(prompts=PROMPTS[1:])
    )
    lines = []
    first = journal(tmp_path / "j", share=lambda value: lines.append(value) or value)
    assert first.find("rollouts/3", 5, PROMPTS) == rollouts()
    other = journal(tmp_path / "elsewhere", 1, share=lambda value: value or lines[0])
    assert other.find("rollouts/3", 5, PROMPTS) == rollouts()


def test_lines_are_forced_to_disk_every_second_and_when_asked(tmp_path, monkeypatch):
    """A thousand completions must not wait for the disk a thousand times."""
    now, forced = [0.0], []
    monkeypatch.setattr("megatron_prepo.run.rollout_journal.time.monotonic", lambda: now[0])
    monkeypatch.setattr(
        durable.os,
        "fsync",
        lambda fd: forced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))),
    )
    first = journal(tmp_path / "j")

    def forced_by(call):
        forced.clear()
        call()
        return list(forced)

    def add():
        first.add("rollouts/3", rollouts())

    file_and_directory = ["rollouts_3.0.jsonl", "j"]
    assert forced_by(add) == []
    now[0] = 1.5
    assert forced_by(add) == file_and_directory
    now[0] = 2.0
    assert forced_by(add) == []
    assert forced_by(first.force) == file_and_directory
    assert forced_by(first.force) == []


def test_files_that_are_not_the_journals_are_left_alone(tmp_path):
    directory = tmp_path / "j"
    directory.mkdir()
    names = ["notes.jsonl", "a.b.jsonl", "rollouts_1.0.jsonl.bak", "rollouts_x.0.jsonl"]
    for name in names:
        (directory / name).write_text("no end of line")
    (directory / "rollouts_1.0.jsonl").write_text("")
    opened = journal(directory)
    opened.forget(before=5)
    assert sorted(path.name for path in directory.iterdir()) == sorted(names)
    opened.close()
    assert {path.read_text() for path in directory.iterdir()} == {"no end of line"}
