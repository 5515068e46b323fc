"""SIGTERM or SIGUSR1 asks a run to stop, as a cluster does before it takes the machines away.

The run saves between two steps and leaves with exit code 75, "try again later" in sysexits.h.  What
takes longer than the time allowed is left where it is: the last checkpoint stays, and the exit code
is the same.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from megatron_prepo.errors import Stopped
from megatron_prepo.local_ranks import STOP_SIGNALS, STOPPED_EXIT_CODE


class StopRequests:
    """Listens from now on; `gather` gives every rank's value to every rank."""

    def __init__(self, grace_seconds: float, gather: Callable[[bool], list[bool]]):
        self.grace_seconds, self.gather = grace_seconds, gather
        self.asked = threading.Event()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in STOP_SIGNALS:
            signal.signal(number, _keep_running)
        # a handler waits until the main thread returns from C; the byte is there at once
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="stop", daemon=True).start()

    def anywhere(self) -> bool:
        """Whether any rank has been asked; collective."""
        return any(self.gather(self.asked.is_set()))

    def stopped(self, num_steps: int) -> Stopped:
        """To be raised once the run is saved."""
        return Stopped(
            f"stopped as asked; {num_steps} steps are saved, and the same command goes on",
            exit_code=STOPPED_EXIT_CODE,
        )

    def _listen(self) -> None:
        while self._reader.recv(1)[0] not in STOP_SIGNALS:
            pass  # Ctrl-C is seen to by Python
        self.asked.set()
        time.sleep(self.grace_seconds)
        os._exit(STOPPED_EXIT_CODE)


def _keep_running(number, frame) -> None:
    """In place of the default, which is to die."""
