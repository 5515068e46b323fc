"""What Slurm tells a task about itself, as the ranks of a job need it.

Slurm starts one task a rank, without torchrun between them: a signal before the time limit reaches
the ranks themselves, and their exit code is the job's.
"""

import re
import socket
from collections.abc import Mapping, MutableMapping

import psutil

from megatron_prepo.errors import UserError

FIRST_PORT, PORTS = 20000, 32
"""Each job has this many ports, by its number, so that jobs on one node do not meet.  The first is
where its ranks meet, then come its SGLang servers', and from the end down one for each rank of a
node (`peers.py`).  All are below those that Linux assigns automatically."""


def hosts(node_list: str) -> list[str]:
    """The hosts of a Slurm node list, in its order.

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
    """`08-10,12` as four numbers with their zeros in front."""
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            numbers.append(str(number).zfill(len(first)))
    return numbers


def rank_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would set, for the task that Slurm describes.

    The ranks of a step are numbered along its nodes, and meet at its first.  Raises UserError if
    there is no Slurm.
    """
    if "SLURM_STEP_NODELIST" not in slurm:
        raise UserError(
            "SLURM_STEP_NODELIST is not set: this is for the tasks of srun (docs/launch.md); use "
            "megatron-prepo train here"
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
    """The port of a node's SGLang server with this index."""
    return ports(slurm)[1 + index]


def sign_of_life_port(slurm: Mapping[str, str], local_rank: int) -> int:
    """Return the port at which a rank of a node shows that it lives."""
    return ports(slurm)[-1 - local_rank]


def interface_to(host: str, port: int = 9) -> str | None:
    """Return the network interface that leads to a host, such as `eth0`; None if none does.

    Nothing is sent: for a datagram socket, connecting is choosing the route.
    """
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            mine = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == mine for address in addresses):
            return name
    return None


def choose_interface(environment: MutableMapping[str, str]) -> None:
    """Set gloo's interface to the one that leads to another node of the job, unless it is set.

    Gloo's own choice is the address of this machine's name, which Debian and Ubuntu put at
    127.0.1.1 in /etc/hosts: the ranks of other nodes would be told to connect there.
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
    """Those of the job, on each of its nodes."""
    first = FIRST_PORT + int(slurm["SLURM_JOB_ID"]) % 300 * PORTS
    return range(first, first + PORTS)
