"""Free ports for processes that are yet to start.

Neither Linux (from 32768 on) nor Kubernetes (from 30000 on) assigns ports in our range, so a port
that is free now is unlikely to be taken before it is used.
"""

import random
import socket

FIRST, LAST = 20_000, 29_999
TRIES = 100


def free_port(host: str = "") -> int:
    """Return a port on which no program listens.

    Raises OSError if `host` is not an address of this machine, or if TRIES ports are all taken.
    """
    choice = (
        random.SystemRandom()
    )  # independent of the seeded generators, which are part of a run's state
    try_to_listen(host, 0)
    for _ in range(TRIES):
        port = choice.randint(FIRST, LAST)
        try:
            try_to_listen(host, port)
        except OSError as error:
            failure = error
        else:
            return port
    raise OSError(
        f"no port of {TRIES} tried between {FIRST} and {LAST} is free on {host or 'this machine'}: "
        f"{failure}"
    )


def try_to_listen(host: str, port: int) -> None:
    """Raise OSError if a program could not listen there; `host` is IPv4, IPv6 or a name."""
    family, _, _, _, address = socket.getaddrinfo(
        host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)


def url(host: str, port: int) -> str:
    """Return the URL of a server.

    >>> url("127.0.0.1", 80), url("::1", 80)
    ('http://127.0.0.1:80', 'http://[::1]:80')
    """
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
