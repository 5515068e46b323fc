"""A lock that lasts exactly as long as its holder lives."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_prepo.errors import UserError
from megatron_prepo.files import lock

HOLD = "import sys, time; from megatron_prepo.files import lock; lock.take(sys.argv[1], 'it');"


@pytest.fixture
def file(tmp_path):
    return tmp_path / lock.FILE


def holder(file, code: str = "print('held', flush=True); time.sleep(600)", **environment):
    """Start a process that holds the lock, and then runs the code."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + code, file],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def test_the_holder_is_named(file):
    process = holder(file, SLURM_JOB_ID="77", SLURMD_NODENAME="gpu03")
    try:
        with pytest.raises(UserError) as refused:
            lock.take(file, "run.dir=here")
        with pytest.raises(UserError) as looked:
            lock.refuse_if_held(file, "run.dir=here")
    finally:
        end(process)
    [words] = {str(refused.value), str(looked.value)}
    assert words.startswith(f"run.dir=here is in use by process {process.pid} on ")
    assert "Slurm job 77 on node gpu03, since 20" in words and " UTC; " in words


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "a"}'])
def test_a_holder_that_cannot_be_read_is_refused_all_the_same(file, content):
    process = holder(file)
    try:
        file.write_text(content)
        with pytest.raises(UserError, match="another process"):
            lock.refuse_if_held(file, "it")
    finally:
        end(process)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_holders_death_frees_it_though_its_child_lives(file, number):
    """The child may be a server or a grading process that rank 0 has started or forked."""
    code = (
        "import subprocess, os\n"
        "child = subprocess.Popen(['sleep', '60'], close_fds=False)\n"
        "fork = os.fork()\n"
        "fork or time.sleep(60)\n"
        "print('held', flush=True); print(child.pid, fork, flush=True); time.sleep(600)"
    )
    process = holder(file, "\n" + code)
    children = [int(pid) for pid in process.stdout.readline().split()]
    try:
        with pytest.raises(UserError):
            lock.refuse_if_held(file, "it")
        process.send_signal(number)
        process.wait()
        assert all(os.path.exists(f"/proc/{pid}") for pid in children)
        lock.take(file, "it")
        lock.give_back(file)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def test_a_child_of_the_holder_does_not_have_it(file):
    with lock.held(file, "it"):
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        child = context.Process(target=_try, args=(file, answers))
        child.start()
        child.join()
        assert "in use by" in answers.get()
        # and what the child closed has not released it
        with pytest.raises(UserError):
            _in_another_process(file)


def _try(file, answers) -> None:
    try:
        lock.take(file, "it")
        answers.put("taken")
    except UserError as error:
        answers.put(str(error))


def _in_another_process(file) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLD, file], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise UserError(done.stderr)


def test_it_is_waited_for_a_moment_and_given_back(file):
    """A launcher hands the lock over to its rank 0."""
    process = holder(file, "print('held', flush=True); time.sleep(0.5)")
    begin = time.monotonic()
    with lock.held(file, "it"), lock.held(file, "it, twice in one process"):
        assert time.monotonic() - begin < lock.PATIENCE_SECONDS
        assert json.loads(file.read_text(encoding="utf-8"))["process"] == os.getpid()
    process.wait()
    _in_another_process(file)


def test_looking_takes_nothing_and_writes_nothing(file):
    lock.refuse_if_held(file, "it")
    assert not file.exists()
    file.touch()
    lock.refuse_if_held(file, "it")
    assert file.read_text() == ""
    with lock.held(file, "it"):
        lock.refuse_if_held(file, "it")  # this process holds it
        with pytest.raises(UserError):
            _in_another_process(file)


def test_a_lock_whose_file_was_removed_is_taken_again(file):
    lock.take(file, "it")
    file.unlink()
    lock.take(file, "it")
    with pytest.raises(UserError):
        _in_another_process(file)
    lock.give_back(file)
    _in_another_process(file)


def test_it_is_held_only_while_its_file_is_in_its_place(tmp_path):
    """Another holder of a new file does not count; a link to the moved folder counts as its
    place."""
    folder, moved = tmp_path / "folder", tmp_path / "moved"
    folder.mkdir()
    file = folder / lock.FILE
    assert not lock.is_held(file)
    lock.take(file, "it")
    assert lock.is_held(file)
    folder.rename(moved)
    assert not lock.is_held(file) and lock.is_held(moved / lock.FILE)
    folder.symlink_to(moved)
    assert lock.is_held(file)
    folder.unlink()
    folder.mkdir()
    process = holder(file)
    assert not lock.is_held(file)
    end(process)
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    fork.Process(target=lambda: answers.put(lock.is_held(moved / lock.FILE))).start()
    assert answers.get() is False
    (moved / lock.FILE).unlink()
    assert not lock.is_held(moved / lock.FILE)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(file, monkeypatch, capsys, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    lock.take(file, "run.dir=here")
    lock.give_back(file)
    said = capsys.readouterr().err
    assert "has no locks" in said and os.strerror(number) in said and "run.dir=here" in said
