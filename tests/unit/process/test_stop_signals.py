"""A stop request is noticed immediately, also while C has the main thread, and has a deadline."""

import signal
import subprocess
import sys
import time

import pytest

from megatron_prepo.process.local_ranks import STOPPED_EXIT_CODE

LISTENS = """
import time
from megatron_prepo.process.stop_signals import StopRequests
stop = StopRequests(grace_seconds={grace}, gather=lambda mine: [False, mine])
assert not stop.anywhere()
print("listening", flush=True)
{then}
"""


def listening(grace: float, then: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENS.format(grace=grace, then=then)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "listening\n", process.stderr.read()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_it_is_heard_and_the_process_goes_on(number):
    process = listening(30.0, "assert stop.asked.wait(20) and stop.anywhere()\nprint('saved')")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "saved\n"), err


def test_ctrl_c_stays_ctrl_c():
    process = listening(30.0, "time.sleep(20)")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in err


def test_the_deadline_ends_a_process_whose_main_thread_is_in_c():
    """Hashing a password with this many rounds takes hours, in which no Python handler can run."""
    then = "import hashlib\nhashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)"
    process = listening(0.3, then)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == STOPPED_EXIT_CODE, err
    assert time.monotonic() - begin < 30


EARLY = """
import time
from megatron_prepo.process import stop_signals as stop
stop.leave_when_asked({code})
print("listening", flush=True)
{then}
"""


def early(code: int, then: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", EARLY.format(code=code, then=then)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "listening\n", process.stderr.read()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_training_listens_a_request_ends_the_process_with_the_launchers_exit_code(number):
    """This holds while the main thread is in C, as in importing and in waiting for other ranks."""
    process = early(7, "import hashlib\nhashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)")
    begin = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    assert time.monotonic() - begin < 30


TAKES_OVER = """
requests = stop.StopRequests(grace_seconds={grace}, gather=lambda mine: [mine])
assert not stop.overdue()
print("training", flush=True)
assert requests.asked.wait(30) and requests.anywhere()
print("overdue" if stop.overdue() else "in time", flush=True)
time.sleep({then})
"""


def test_training_takes_over_and_has_its_time_to_save():
    process = early(7, TAKES_OVER.format(grace=60, then=0))
    assert process.stdout.readline() == "training\n", process.stderr.read()
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "in time\n"), err


def test_what_is_not_saved_by_the_deadline_has_the_launchers_exit_code_too():
    process = early(0, TAKES_OVER.format(grace=1, then=50))
    assert process.stdout.readline() == "training\n", process.stderr.read()
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "overdue\n"), err


MISSING = """
from megatron_prepo.errors import Stopped
def gather(mine):
    print("lost", flush=True)
    raise RuntimeError("Connection closed by peer")
try:
    stop.StopRequests(grace_seconds=60, gather=gather)
except Stopped as stopped:
    print("stopped", stopped.exit_code)
"""


def test_a_rank_that_was_asked_before_it_listened_is_no_failure_of_the_other_ranks():
    """The signal reaches all ranks, but not at the same time."""
    process = early(0, MISSING)
    assert process.stdout.readline() == "lost\n", process.stderr.read()
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "stopped 75\n"), err


def test_a_rank_that_is_missing_for_another_reason_is_a_failure():
    process = early(0, "stop.SKEW_SECONDS = 0.1" + MISSING)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Connection closed by peer" in err
