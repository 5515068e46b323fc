"""A proof that ends early leaves no process running, and reports the reason."""

import os
import subprocess
import sys
import time

import pytest

from megatron_prepo.debug import resume_check as prove
from megatron_prepo.errors import UserError
from tools.checks import gpu_parts

DEADLINE_SECONDS = 60.0
WITH_A_CHILD = (
    "import os, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "open(sys.argv[1] + '.new', 'w').write(f'{os.getpid()} {child.pid}')\n"
    "os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
    "time.sleep(600)\n"
)


@pytest.fixture
def prove_with(tmp_path, monkeypatch):
    """A proof whose runs are this program, which is told a file beside the run's directory."""

    def prove_it(program: str):
        def start(config, settings, run) -> subprocess.Popen:
            command = [sys.executable, "-c", program, f"{run}.pids", f"run.dir={run}"]
            return subprocess.Popen(command, start_new_session=True)

        monkeypatch.setattr(prove, "_start", start)
        monkeypatch.setattr(prove, "_clear", lambda *_: None)
        if program == WITH_A_CHILD:
            monkeypatch.setattr(prove, "_finish", lambda process, run: os.killpg(process.pid, 9))
        return prove.prove(tmp_path / "config.yaml", [], tmp_path / "proof", before=1, after=1)

    return prove_it


def test_a_run_that_ends_before_it_is_killed_is_named(prove_with, tmp_path):
    with pytest.raises(UserError, match=r"ended before it could be killed; see .*killed\.log"):
        prove_with("pass")


def test_a_first_run_that_fails_is_named(prove_with, tmp_path):
    with pytest.raises(UserError, match=r"a run failed; see .*whole\.log"):
        prove_with("raise SystemExit(1)")


def test_ctrl_c_stops_the_run_and_its_ranks(prove_with, tmp_path, monkeypatch):
    pids = tmp_path / "proof" / "killed.pids"

    def interrupt(seconds: float) -> None:
        if pids.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(prove.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prove_with(WITH_A_CHILD)
    monkeypatch.undo()
    assert_gone(pids.read_text())


def test_ctrl_c_stops_a_part_of_the_gpu_check(tmp_path, monkeypatch):
    pids = tmp_path / "pids"

    def interrupt(process, timeout=None):
        if timeout is None:
            return real(process)
        while not pids.exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    real = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gpu_parts.run_within(60.0, [sys.executable, "-c", WITH_A_CHILD, str(pids)])
    monkeypatch.undo()
    assert_gone(pids.read_text())


def assert_gone(pids: str) -> None:
    """Zombies, whose new parent has not waited for them, count as gone."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    for pid in pids.split():
        while os.path.exists(f"/proc/{pid}"):
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    break
            assert time.monotonic() < deadline, f"{pid} is still running"
            time.sleep(0.01)
