"""A request to stop is heard at once, also while C has the main thread, and has a deadline."""

import signal
import subprocess
import sys
import time

import pytest

from megatron_prepo.local_ranks import STOPPED_EXIT_CODE

LISTENS = """
import time
from megatron_prepo.stop import StopRequests
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
    """Hashing a password so often takes hours, in which no handler of Python's can run."""
    then = "import hashlib\nhashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)"
    process = listening(0.3, then)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == STOPPED_EXIT_CODE, err
    assert time.monotonic() - begin < 30
