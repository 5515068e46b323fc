"""Detection of lost ranks and machines after a collective has failed.

The errors of gloo and NCCL name a timeout, not a rank.  So each rank opens a port of the job and
accepts nothing there: its kernel completes connections as long as process and machine are alive.

connection     the rank is alive
refused        its process has ended
no response    its machine, or the network to it, is lost
"""

import os
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megatron_prepo.process import slurm as nodes

CONNECT_SECONDS = 5.0
UNREACHABLE_EXIT_CODE = 69
"""Exit code if a machine of the job does not respond: EX_UNAVAILABLE of sysexits.h.  The job should
be retried on other machines; Slurm may take minutes to notice (SlurmdTimeout)."""


@dataclass(frozen=True)
class Peer:
    """A process of the job and a port on which it listens."""

    name: str
    host: str
    port: int


@dataclass(frozen=True)
class Lost:
    """A peer that is not reachable."""

    peer: Peer
    machine: bool
    """Whether the machine, and not only the process, is not reachable."""
    how: str

    def __str__(self) -> str:
        what = "does not answer; machine or network lost" if self.machine else "has ended"
        return f"{self.peer.name} on {self.peer.host} {what} ({self.how})"


def ranks() -> list[Peer]:
    """Return the ranks of this step, from Slurm's environment."""
    environment = os.environ
    hosts = nodes.hosts(environment["SLURM_STEP_NODELIST"])
    a_node = int(environment["SLURM_NTASKS"]) // len(hosts)
    return [
        Peer(f"rank {n * a_node + i}", host, nodes.sign_of_life_port(environment, i))
        for n, host in enumerate(hosts)
        for i in range(a_node)
    ]


def listen() -> socket.socket | None:
    """Open this rank's port; None, with a warning, if it is taken."""
    port = nodes.sign_of_life_port(os.environ, int(os.environ["SLURM_LOCALID"]))
    try:
        return socket.create_server(("", port), backlog=socket.SOMAXCONN)
    except OSError as error:
        rank = os.environ["SLURM_PROCID"]
        print(f"rank {rank}: other ranks will report this one as lost: {error}", file=sys.stderr)
        return None


def lost(peers: Sequence[Peer]) -> list[Lost]:
    """Return the peers that are not reachable; takes at most a few times CONNECT_SECONDS."""
    with ThreadPoolExecutor(max_workers=min(64, len(peers) or 1)) as pool:
        return [found for found in pool.map(_look_at, peers) if found]


def _look_at(peer: Peer) -> Lost | None:
    try:
        socket.create_connection((peer.host, peer.port), timeout=CONNECT_SECONDS).close()
    except ConnectionRefusedError as error:
        return Lost(peer, False, str(error))
    except OSError as error:
        return Lost(peer, True, str(error))
    return None
