"""No command is silent: what it does is shown, on a terminal and in a log, and nothing else is."""

import io
import os
import subprocess
import sys
from itertools import pairwise

import pytest

from megatron_prepo.process import activity, progress
from megatron_prepo.process.activity import GROWTH, SECONDS


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def status_of(monkeypatch):
    """Return a status that writes to a stream and is looked at by hand."""

    def make(stream: io.StringIO) -> activity.Status:
        monkeypatch.setattr(activity, "_entries", [])
        status = activity.Status(stream)
        monkeypatch.setattr(activity, "_statuses", [status])
        monkeypatch.setattr(sys, "stderr", activity.Watched(stream, status))
        return status

    return make


def test_a_log_gets_a_line_after_silence_and_ever_fewer(status_of):
    status = status_of(io.StringIO())
    with activity.doing("the command"), activity.doing("reading"):
        start = status.last = activity._entries[-1].since
        status.look(start + SECONDS / 2)
        assert status.stream.getvalue() == ""
        now = start
        for _ in range(400):
            now += 0.1
            status.look(now)
    lines = status.stream.getvalue().splitlines()
    assert lines[0] == "... reading, 2 s" and lines[-1].startswith("... reading, ")
    times = [int(line.split()[-2]) for line in lines]
    assert max(b - a for a, b in pairwise(times[:11])) <= SECONDS + 1
    assert max(b - a for a, b in pairwise(times)) <= GROWTH * 40 + 1
    assert len(lines) < 30


def test_output_of_the_command_postpones_it_and_a_line_under_way_is_not_broken(status_of):
    status = status_of(io.StringIO())
    with activity.doing("converting"):
        status.last = activity._entries[-1].since - 100
        print("half a line", end="", file=sys.stderr)
        status.look(status.last + 50)
        print(", and the rest", file=sys.stderr)
        status.look(status.last + SECONDS / 2)
    assert status.stream.getvalue() == "half a line, and the rest\n"


def test_a_terminal_has_one_line_that_is_replaced_and_cleared(status_of):
    status = status_of(Terminal())
    with activity.doing("checking model and prompts"):
        status.look(status.last + SECONDS)
        status.look(status.last + 1.0)
        print("a line of ours", file=sys.stderr)
    one, other, ours = status.stream.getvalue().split(activity.CLEAR)[1:]
    assert one.startswith("... checking model and prompts, ") and other.startswith("... checking")
    assert ours == "a line of ours\n"


def test_a_bar_shows_the_activity_that_began_after_it_and_ends_complete(status_of):
    status = status_of(Terminal())
    with progress.bar(desc="train", total=2) as bar:
        with activity.doing("generating rollouts"):
            status.look(status.last + 60)
        assert "train, generating rollouts:   0%" in status.stream.getvalue()
        bar.update()
        bar.update()
    last = status.stream.getvalue().rstrip("\n").split("\r")[-1]
    assert last.startswith("train: 100%") and "2/2" in last and not activity._entries


def test_another_process_that_has_the_terminal_is_not_disturbed(status_of):
    status = status_of(io.StringIO())
    with activity.doing("training"):
        with activity.handed_over():
            status.look(status.last + 60)
        assert status.stream.getvalue() == ""
        status.look(status.last + SECONDS)
        assert status.stream.getvalue().startswith("... training")


COMMAND = """
import sys, time
from megatron_prepo.process import activity
from megatron_prepo.process.command import in_one_line

@in_one_line
def main():
    with activity.doing("counting"):
        time.sleep(2.5)
    {then}
    return 0

sys.exit(main())
"""


@pytest.mark.parametrize(
    ("then", "code", "words"),
    [
        ("print('done')", 0, []),
        ("raise KeyboardInterrupt", 130, ["interrupted; the same command starts again"]),
        ("raise KeyboardInterrupt('interrupted; resume it by X')", 130, ["resume it by X"]),
    ],
)
def test_every_command_shows_it_and_ctrl_c_ends_it_in_one_line(then, code, words):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", activity.QUIET)}
    for quiet in ("", "1"):
        done = subprocess.run(
            [sys.executable, "-c", COMMAND.format(then=then)],
            env=environment | {activity.QUIET: quiet},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        lines = done.stderr.splitlines()
        assert lines[0].startswith("... counting, ") == (not quiet) if lines else quiet
        assert len(lines) == len(words) + (not quiet)
        assert all(word in lines[-1] for word in words)
