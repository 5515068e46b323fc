"""What Slurm tells a task about itself, as the ranks of a job need it.

Slurm starts one task a rank, without torchrun between them: a signal before the time limit reaches
the ranks themselves, and their exit code is the job's.
"""

import re
from collections.abc import Mapping

from megatron_prepo.errors import UserError

FIRST_PORT, PORTS = 20000, 32
"""Each job has so many ports, by its number, so that jobs on one node do not meet: the first is
where its ranks do, the others are its SGLang servers'.  They end below those that Linux gives out
by itself."""


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


def ports(slurm: Mapping[str, str]) -> range:
    """Those of the job, on each of its nodes."""
    first = FIRST_PORT + int(slurm["SLURM_JOB_ID"]) % 300 * PORTS
    return range(first, first + PORTS)
