"""Parent process of a server that stops all of the server's processes when it or the trainer ends.

Run as a script by the server's interpreter, so it imports the standard library only:

    python guard.py PARENT_PID COMMAND...

A trainer that gets SIGKILL cannot clean up; the guard notices that its parent process has changed,
and kills the server's process group.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.2
GRACE_SECONDS = 3.0
"""Time between SIGTERM and SIGKILL; a server has no state to save."""


def main(parent: int, command: list[str]) -> int:
    """Run the server; returns its exit code, 128 + N for signal N, as in a shell."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.append(True))
    # Slurm sends its warning before the time limit to all processes; the trainer handles it
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    server = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_guard)
    while server.poll() is None and os.getppid() == parent and not asked:
        time.sleep(POLL_SECONDS)
    code = server.poll()
    _end_group(server)
    if code is None:
        code = -signal.SIGTERM
    return code if code >= 0 else 128 - code


def _end_group(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while server.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _die_with_guard() -> None:
    """Have the kernel kill the server if the guard is killed (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
