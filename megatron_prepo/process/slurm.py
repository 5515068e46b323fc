"""Environment of a Slurm task, translated for the ranks of a job.

Slurm starts one task per rank, without torchrun in between: a signal before the time limit reaches
the ranks directly, and their exit code is the job's.
"""

import re
import socket
from collections.abc import Mapping, MutableMapping

import psutil

from megatron_prepo.errors import UserError

FIRST_PORT, PORTS = 20000, 32
"""Ports per job, chosen by job number so that jobs on one node do not collide.  The first one is
the rendezvous of the ranks, followed by those of its SGLang servers; in descending order from the
last one there is one per rank of a node (`peers.py`).  All are below the range that Linux assigns
automatically."""


def hosts(node_list: str) -> list[str]:
    """Return the hosts of a Slurm node list, in its order.

    >>> hosts("gpu[08-10,12],head")
    ['gpu08', 'gpu09', 'gpu10', 'gpu12', 'head']
    >>> hosts("r[1-2]n[1-2]-ib")
    ['r1n1-ib', 'r1n2-ib', 'r2n1-ib', 'r2n2-ib']
    """
    expanded = []
    for entry in re.findall(r"(?:[^,\[]|\[[^]]*\])+", node_list):
        names = [""]
        for literal, ranges in re.findall(r"([^\[]+)|\[([^]]*)\]", entry):
            endings = [literal] if literal else _numbers(ranges)
            names = [name + ending for name in names for ending in endings]
        expanded += names
    return expanded


def _numbers(ranges: str) -> list[str]:
    """Expand ranges: `08-10,12` is four numbers, with leading zeros."""
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            numbers.append(str(number).zfill(len(first)))
    return numbers


def rank_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that torchrun would set for this Slurm task.

    The ranks of a step are numbered in the order of its nodes, and rendezvous at the first one.
    Raises UserError outside Slurm.
    """
    if "SLURM_STEP_NODELIST" not in slurm:
        raise UserError(
            "SLURM_STEP_NODELIST is not set: this module is for tasks of srun (docs/launch.md); "
            "use megatron-prepo train instead"
        )
    tasks = int(slurm["SLURM_NTASKS"])
    step_hosts = hosts(slurm["SLURM_STEP_NODELIST"])
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks // len(step_hosts)),
        "MASTER_ADDR": step_hosts[0],
        "MASTER_PORT": str(ports(slurm)[0]),
    }


def server_port(slurm: Mapping[str, str], index: int) -> int:
    """Return the port of a node's SGLang server with this index."""
    return ports(slurm)[1 + index]


def sign_of_life_port(slurm: Mapping[str, str], local_rank: int) -> int:
    """Return the port on which a rank of a node shows that it is alive."""
    return ports(slurm)[-1 - local_rank]


def interface_to(host: str, port: int = 9) -> str | None:
    """Return the network interface of the route to a host, such as `eth0`; None if there is none.

    Nothing is sent: connecting a datagram socket only chooses the route.
    """
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            mine = probe.getsockname()[0]
    except OSError:
        return None
    name: str
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == mine for address in addresses):
            return name
    return None


def choose_interface(environment: MutableMapping[str, str]) -> None:
    """Set gloo's interface to that of the route to another node of the job, unless it is set.

    By default gloo uses the address of this machine's name, which Debian and Ubuntu map to
    127.0.1.1 in /etc/hosts: the ranks of other nodes would try to connect to that address.
    """
    others = [
        host
        for host in hosts(environment["SLURM_JOB_NODELIST"])
        if host != environment["SLURMD_NODENAME"]
    ]
    if others and "GLOO_SOCKET_IFNAME" not in environment:
        interface = interface_to(others[0])
        if interface not in (None, "lo"):
            environment["GLOO_SOCKET_IFNAME"] = interface


def ports(slurm: Mapping[str, str]) -> range:
    """Return the ports of the job, on each of its nodes."""
    first = FIRST_PORT + int(slurm["SLURM_JOB_ID"]) % 300 * PORTS
    return range(first, first + PORTS)
