"""The launcher: all ranks end well, or all are stopped, and the first error is shown."""

import os
import signal
import sys
import threading
import time

import pytest

from megatron_prepo.errors import Stopped, UserError
from megatron_prepo.process import local_ranks
from megatron_prepo.process.local_ranks import RanksFailed, start


def run(tmp_path, code: str, num_ranks: int = 3) -> None:
    preamble = (
        "import os, sys, time, signal\n"
        "from megatron_prepo.process.local_ranks import run_rank\n"
        "from megatron_prepo.errors import UserError\n"
        "rank = int(os.environ['RANK'])\n"
    )
    start([sys.executable, "-c", preamble + code], num_ranks, tmp_path / "logs")


def test_all_ranks_run(tmp_path):
    run(tmp_path, f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write('here')")
    assert sorted(p.name for p in tmp_path.glob("[0-9]")) == ["0", "1", "2"]


def test_the_first_error_is_shown_and_the_others_are_ended(tmp_path):
    code = """
def main():
    if rank == 1:
        raise ValueError("the culprit")
    time.sleep(60)
sys.exit(run_rank(main))
"""
    begin = time.monotonic()
    with pytest.raises(RanksFailed) as failure:
        run(tmp_path, code)
    assert time.monotonic() - begin < 30
    message = str(failure.value)
    assert message.startswith("rank 1 failed") and message.endswith("ValueError: the culprit\n")
    assert message.count("Traceback") == 1


def test_an_error_that_follows_from_another_is_not_shown(tmp_path):
    code = f"""
failing = {str(tmp_path / "failing")!r}
def main():
    if rank == 2:
        open(failing, "w").close()
        raise ValueError("cause")
    while not os.path.exists(failing):
        time.sleep(0.01)
    time.sleep(0.3)
    raise ValueError("connection reset by peer")
sys.exit(run_rank(main))
"""
    with pytest.raises(RanksFailed, match="rank 2 failed") as failure:
        run(tmp_path, code)
    assert "reset by peer" not in str(failure.value)


def test_errors_come_in_their_order_though_the_time_of_day_jumps_back(tmp_path, monkeypatch):
    monkeypatch.setattr(local_ranks, "_die_with_parent", lambda: None)
    hours = iter([5, 0])
    monkeypatch.setattr(local_ranks.time, "time_ns", lambda: next(hours) * 3600 * 10**9)

    def fail():
        raise UserError("the cause" if os.environ["RANK"] == "1" else "a consequence")

    errors = {}
    for rank in (1, 0):
        reader, writer = os.pipe()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv(local_ranks.ERROR_PIPE, str(writer))
        assert local_ranks.run_rank(fail) == 2
        os.close(writer)
        errors[rank] = local_ranks._read(reader)
    expected = ["error: the cause", "error: a consequence"]
    assert local_ranks._in_order(errors, [0, 1]) == expected


def test_a_long_error_with_any_text_comes_though_a_child_holds_the_pipe(tmp_path):
    code = """
def main():
    if os.fork() == 0:
        time.sleep(60)
    raise ValueError("\\ud800 " + "x" * 100_000)
sys.exit(run_rank(main))
"""
    with pytest.raises(RanksFailed) as failure:
        run(tmp_path, code, num_ranks=1)
    words = str(failure.value)
    assert "ValueError: \\ud800 xxx" in words and 50_000 < len(words) <= local_ranks.MAX_ERROR_BYTES


def test_a_users_error_has_no_stack_trace(tmp_path):
    code = "sys.exit(run_rank(lambda: (_ for _ in ()).throw(UserError('set x=1'))))"
    with pytest.raises(RanksFailed) as failure:
        run(tmp_path, code)
    assert str(failure.value) == "error: set x=1" and failure.value.exit_code == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            "raise OSError(28, os.strerror(28), '/data/x')",
            "No space left on device: '/data/x'; make",
        ),
        (
            "raise OSError(122, os.strerror(122))",
            r"Disk quota exceeded \(writing in <string>, line 6\)",
        ),
        (
            "raise RuntimeError('I/O error: (os error 28)')",
            r"I/O error: \(os error 28\); make room",
        ),
        (
            "try:\n        os.write(os.open('/dev/full', os.O_WRONLY), b'x')\n"
            "    finally:\n        raise ValueError('a consequence')",
            r"No space left on device \(writing in <string>, line 7\); make room there, and",
        ),
    ],
)
def test_a_full_disk_is_one_line(tmp_path, fault, words):
    with pytest.raises(RanksFailed, match=words) as failure:
        run(tmp_path, f"def main():\n    {fault}\nsys.exit(run_rank(main))", num_ranks=1)
    assert "\n" not in str(failure.value) and failure.value.exit_code == 1
    assert str(failure.value).startswith("error: rank 0: ")


def test_a_killed_rank_is_named(tmp_path):
    code = "print('last words', flush=True)\nif rank == 1: os.kill(os.getpid(), 9)\ntime.sleep(60)"
    with pytest.raises(RanksFailed, match="rank 1 died with SIGKILL") as failure:
        run(tmp_path, code)
    assert "out of memory" in str(failure.value) and "last words" in str(failure.value)


STOPPABLE = """
from megatron_prepo.errors import Stopped
def main():
    asked = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: asked.append(True))
    open(os.path.join(os.environ["READY"], str(rank)), "w").close()
    while not asked:
        time.sleep(0.01)
    time.sleep(0.3 * rank)
    raise Stopped("saved", exit_code=75)
sys.exit(run_rank(main))
"""


def ask_when_ready(tmp_path, number: int, ask) -> None:
    """Call `ask(number)` in the background, once all three ranks listen."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("[0-9]"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        ask(number)

    threading.Thread(target=wait).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_reaches_all_ranks_and_waits_for_them(
    tmp_path, monkeypatch, number
):
    monkeypatch.setenv("READY", str(tmp_path))
    before = signal.getsignal(number)
    ask_when_ready(tmp_path, number, lambda number: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match="saved") as stopped:
        run(tmp_path, STOPPABLE)
    assert stopped.value.exit_code == 75
    assert len(list((tmp_path / "logs").glob("*.error"))) == 3
    assert signal.getsignal(number) == before


def test_ctrl_c_saves_first_and_ends_the_ranks_when_repeated(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("READY", str(tmp_path))
    before = signal.getsignal(signal.SIGINT)
    ask_when_ready(tmp_path, signal.SIGINT, lambda number: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match="saved") as stopped:
        run(tmp_path, STOPPABLE)
    assert stopped.value.exit_code == 130
    assert "stop after this step, and save it" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before

    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
    for seconds in (1.5, 2.5):
        threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, f"import signal\n{deaf}")


def test_ranks_do_not_hear_the_terminals_ctrl_c(tmp_path):
    run(tmp_path, "import signal\nassert signal.getsignal(signal.SIGINT) == signal.SIG_IGN")


def test_a_rank_that_leaves_without_saving_has_not_failed(tmp_path):
    code = "time.sleep(0.2 * rank)\nos._exit(75 if rank == 0 else 1)"
    with pytest.raises(Stopped, match="before a step could be saved"):
        run(tmp_path, code)


def test_a_signal_before_the_ranks_listen_stops_them_too(tmp_path):
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped):
        run(tmp_path, "time.sleep(60)")


def test_ranks_that_do_not_follow_the_one_that_left_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(local_ranks, "LEAVING_SECONDS", 0.3)
    with pytest.raises(Stopped):
        run(tmp_path, "os._exit(75) if rank == 0 else time.sleep(60)")
