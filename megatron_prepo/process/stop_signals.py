"""Stop requests: SIGTERM or SIGUSR1, which clusters send before they reclaim the machines.

The run saves between two steps and exits with code 75, "try again later" in sysexits.h.  If that
takes longer than the time allowed, the run exits without saving, with the same code; the last
checkpoint remains valid.  A launcher that wants another exit code, or requests handled before
training starts, calls `leave_when_asked` first.
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
"""Maximum time between the first and the last rank that receives a signal sent to all."""


class _Listener:
    """A thread that receives the signals; a handler would wait for the main thread to leave C."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        self.grace_seconds = 0.0
        """Time to save; zero until training starts, since there is nothing to save before."""
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
            pass  # Python handles Ctrl-C
        self.asked_at = time.monotonic()
        self.asked.set()
        time.sleep(self.grace_seconds)
        os._exit(self.exit_code)


_listener: list[_Listener] = []
"""The process's listener, if any; signal handlers are per process, too."""


def leave_when_asked(exit_code: int) -> None:
    """Listen from now on; a request ends the process with this exit code.

    Immediately, unless a StopRequests has set a time to save.
    """
    _listener[:] = [_Listener(exit_code)]


def overdue() -> bool:
    """Return whether the time to save is nearly over.

    A rank that fails then has lost a peer that received the signal and met its deadline earlier.
    """
    if not _listener:
        return False
    allowed = _listener[0].grace_seconds - SKEW_SECONDS
    return time.monotonic() - _listener[0].asked_at > allowed


class StopRequests:
    """Requests to stop, received from now on; collective.

    `gather` gives every rank's value to every rank.
    """

    def __init__(self, grace_seconds: float, gather: Callable[[bool], list[bool]]) -> None:
        self.gather = gather
        if not _listener:
            leave_when_asked(STOPPED_EXIT_CODE)
        _listener[0].grace_seconds = grace_seconds
        self.asked = _listener[0].asked
        self._all_listen()

    def anywhere(self) -> bool:
        """Return whether any rank has received a request; collective."""
        return any(self.gather(self.asked.is_set()))

    def stopped(self, num_steps: int) -> Stopped:
        """Return the exception to raise once the run is saved."""
        return Stopped(
            f"stopped as asked; {num_steps} steps are saved, and the same command resumes",
            exit_code=STOPPED_EXIT_CODE,
        )

    def _all_listen(self) -> None:
        """Wait for the other ranks.

        A rank that received a request too early to save is then missed here, not within a step.
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
    """Do nothing, in place of the default handler, which ends the process."""
