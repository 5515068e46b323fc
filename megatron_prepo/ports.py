"""Ports for processes that are still to start.

From a range in which neither Linux (from 32768 on) nor Kubernetes (from 30000 on) gives any away:
what is free now is not taken by chance before it is used.
"""

import random
import socket

FIRST, LAST = 20_000, 29_999
TRIES = 100


def free_port(host: str = "") -> int:
    """One that nobody listens on; OSError if so many of the range are taken that none is found."""
    choice = random.SystemRandom()  # the others' random numbers are part of a run
    for _ in range(TRIES):
        port = choice.randint(FIRST, LAST)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except OSError as error:
                failure = error
            else:
                return port
    raise OSError(
        f"no port of {TRIES} tried between {FIRST} and {LAST} is free on {host or 'this machine'}: "
        f"{failure}"
    )
