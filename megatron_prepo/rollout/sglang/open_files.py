"""Limit of open files (`ulimit -n`) of this process: each completion in progress is a connection.

The soft limit, often 1,024, is raised as needed; the hard limit is set by the administrator.
"""

import errno
import os
import resource

from megatron_prepo.config import ServersConfig
from megatron_prepo.errors import UserError

OTHERS = 256
"""Other files of a rank: logs, checkpoint shards, libraries, grading processes, collectives."""


def make_room(settings: ServersConfig, servers: int) -> None:
    """Raise the soft limit so that all completions at this many servers can be in progress.

    Raises UserError with the numbers if the hard limit is lower.
    """
    connections = servers * (1 if settings.straggler_seconds is None else 2)  # one to cut it
    needed = OTHERS + connections * settings.concurrency
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        most = max(1, (hard - OTHERS) // connections)
        raise UserError(
            f"servers.concurrency={settings.concurrency} at {servers} server"
            f"{'s' * (servers > 1)} may need {needed:,} open files, and this machine allows a "
            f"process {hard:,} (ulimit -Hn); raise that limit, or set servers.concurrency={most}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def exhausted(error: BaseException) -> bool:
    """Return whether a connection failed because process or machine cannot open another file.

    A cause of the error has the number; if a name could not be resolved, opening a file decides.
    """
    behind, numbers = [error], []
    while behind:
        one = behind.pop()
        numbers += [one.errno] if isinstance(one, OSError) else []
        behind += [e for e in (one.__cause__, one.__context__) if e is not None]
        if hasattr(one, "exceptions"):  # a group: one for each address tried
            behind += one.exceptions
    if {errno.EMFILE, errno.ENFILE} & set(numbers):
        return True
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as failure:
        return failure.errno in (errno.EMFILE, errno.ENFILE)
    return False
