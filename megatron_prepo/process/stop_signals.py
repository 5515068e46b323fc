"""SIGTERM or SIGUSR1 asks a run to stop, as a cluster does before it takes the machines away.

The run saves between two steps and leaves with exit code 75, "try again later" in sysexits.h.  What
takes longer than the time allowed is left where it is: the last checkpoint stays, and the exit code
is the same.  A launcher that wants another exit code, or requests heard before training listens,
calls `leave_when_asked` first.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from megatron_prepo.errors import Stopped
from megatron_prepo.process.local_ranks import STOP_SIGNALS, STOPPED_EXIT_CODE

SKEW_SECONDS = 10.0
"""From the first rank that a signal to all of them reaches to the last."""


class _Listener:
    """The signals, heard by a thread: a handler waits until the main thread returns from C."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        self.grace_seconds = 0.0
        """Until training takes over there is nothing to save."""
        self.asked = threading.Event()
        self.asked_at = float("inf")
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in STOP_SIGNALS:
            signal.signal(number, _keep_running)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="stop", daemon=True).start()

    def _listen(self) -> None:
        while self._reader.recv(1)[0] not in STOP_SIGNALS:
            pass  # Ctrl-C is seen to by Python
        self.asked_at = time.monotonic()
        self.asked.set()
        time.sleep(self.grace_seconds)
        os._exit(self.exit_code)


_listener: list[_Listener] = []
"""Of this process, as signals are."""


def leave_when_asked(exit_code: int) -> None:
    """Listen from now on; a request ends the process with this exit code.

    Immediately, until a StopRequests gives it time to save.
    """
    _listener[:] = [_Listener(exit_code)]


def overdue() -> bool:
    """Whether the time of a request is nearly over.

    A rank that fails then has lost another one to its deadline, whose signal came earlier.
    """
    if not _listener:
        return False
    allowed = _listener[0].grace_seconds - SKEW_SECONDS
    return time.monotonic() - _listener[0].asked_at > allowed


class StopRequests:
    """Listens from now on; `gather` gives every rank's value to every rank.  Collective."""

    def __init__(self, grace_seconds: float, gather: Callable[[bool], list[bool]]) -> None:
        self.gather = gather
        if not _listener:
            leave_when_asked(STOPPED_EXIT_CODE)
        _listener[0].grace_seconds = grace_seconds
        self.asked = _listener[0].asked
        self._all_listen()

    def anywhere(self) -> bool:
        """Whether any rank has been asked; collective."""
        return any(self.gather(self.asked.is_set()))

    def stopped(self, num_steps: int) -> Stopped:
        """Return what is to be raised once the run is saved."""
        return Stopped(
            f"stopped as asked; {num_steps} steps are saved, and the same command goes on",
            exit_code=STOPPED_EXIT_CODE,
        )

    def _all_listen(self) -> None:
        """Wait for the other ranks.

        One that was asked before it could save is missing here, and not in the middle of a step.
        """
        try:
            self.gather(False)
        except RuntimeError as error:
            if not self.asked.wait(SKEW_SECONDS):
                raise
            raise Stopped(
                "stopped as asked before a step could be saved; the same command resumes from the "
                "last checkpoint",
                exit_code=STOPPED_EXIT_CODE,
            ) from error


def _keep_running(number: int, frame: object) -> None:
    """Replace the default, which is to die."""
