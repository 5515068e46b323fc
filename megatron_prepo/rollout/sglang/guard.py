"""Stands between the trainer and a server: when either ends, however, the server's processes do.

Run as a script by the server's interpreter, so it imports the standard library only:

    python guard.py PARENT_PID COMMAND...

A signal to the parent may leave it no time to clean up (SIGKILL); the guard sees that its parent is
another one, and ends the server's process group.
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
"""From asking the server to stop until it is killed: it holds nothing that is worth saving."""


def main(parent: int, command: list[str]) -> int:
    """The server's exit code, 128 + N for signal N, as a shell has it."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.append(True))
    # Slurm's warning before the time limit goes to all processes of a job; it is for the trainer
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    server = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_guard)
    while server.poll() is None and os.getppid() == parent and not asked:
        time.sleep(POLL_SECONDS)
    code = server.poll()
    _end_group(server)
    if code is None:
        code = -signal.SIGTERM
    return code if code >= 0 else 128 - code


def _end_group(server: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while server.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _die_with_guard() -> None:
    """Linux: should somebody kill the guard itself."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
