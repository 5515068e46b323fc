"""Locks that admit one process to a folder, and that are released however their holder dies.

The lock is a POSIX record lock (`fcntl.lockf`) on `.megatron-prepo.lock`.  The file names the
holder and is never removed; its existence means nothing.  The kernel releases the lock when the
process ends, SIGKILL included, and children do not inherit it, so a server or a grading process
that outlives its rank does not hold it.  On NFS (v3 with lockd, v4), GPFS and Lustre (mounted with
`flock`) it works between machines; if a machine loses power, NFSv4 releases its locks when the
lease expires, after 90 seconds by default.  A warning is logged on a file system without locks.

A process must not open the file of a lock that it holds: closing any of its descriptors would
release the lock.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from megatron_prepo.errors import UserError

FILE = ".megatron-prepo.lock"
PATIENCE_SECONDS = 2.0
"""Maximum time to wait for a lock: a launcher hands it over to its rank 0, and other processes hold
it briefly to test whether it is free."""
POLL_SECONDS = 0.05
HELD = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)

_held: dict[Path, tuple[int, int, int]] = {}
"""Locks of this process: (process, descriptor, number of times taken).  A fork has none."""


def take(file: str | Path, what: str) -> None:
    """Hold the lock until `give_back` or the end of the process, which may take it repeatedly.

    Raises UserError, with `what` and the holder, if another process holds the lock.
    """
    file = _canonical(file)
    if _is_mine(file):
        process, held, count = _held[file]
        _held[file] = process, held, count + 1
        return
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (descriptor := _try(file, what)) is None:
        if time.monotonic() > deadline:
            raise UserError(_in_use(file, what))
        time.sleep(POLL_SECONDS)
    _held[file] = os.getpid(), descriptor, 1
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(_holder()) + "\n").encode(), 0)
    os.fsync(descriptor)  # for processes on other machines


def give_back(file: str | Path) -> None:
    """Undo one `take`; the last one releases the lock."""
    file = _canonical(file)
    if not _is_mine(file):
        return
    process, descriptor, count = _held[file]
    if count > 1:
        _held[file] = process, descriptor, count - 1
        return
    del _held[file]
    os.close(descriptor)


@contextlib.contextmanager
def held(file: str | Path, what: str) -> Iterator[None]:
    """Hold the lock in the body; UserError if another process has it."""
    take(file, what)
    try:
        yield
    finally:
        give_back(file)


def is_held(file: str | Path) -> bool:
    """Return whether the file at this path is still one whose lock this process holds.

    False once the file, or a folder above it, was moved, removed or replaced.  Raises OSError if
    the check itself fails.
    """
    try:
        found = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return any(
        process == os.getpid() and os.path.samestat(os.fstat(descriptor), found)
        for process, descriptor, _ in _held.values()
    )


def refuse_if_held(file: str | Path, what: str) -> None:
    """Raise UserError, with the holder, if another process holds the lock; nothing is written."""
    if is_held_elsewhere(file):
        raise UserError(_in_use(_canonical(file), what))


def is_held_elsewhere(file: str | Path) -> bool:
    """Return whether another process holds the lock; False on a file system without locks."""
    file = _canonical(file)
    if _is_mine(file) or not file.is_file():
        return False
    descriptor = _open(file, os.O_RDONLY)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (*HELD, *NO_LOCKS):
            raise
        return error.errno in HELD
    finally:
        os.close(descriptor)
    return False


def _try(file: Path, what: str) -> int | None:
    """Take the lock and return its descriptor; None if another process has it."""
    descriptor = _open(file, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            os.close(descriptor)
            return None
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
        print(
            f"warning: the file system of {file.parent} has no locks ({error.strerror}), so a "
            f"second process could use {what} at the same time: make sure that none does "
            "(Lustre: mount it with flock)",
            file=sys.stderr,
        )
        return descriptor
    try:
        current = os.stat(file)
    except FileNotFoundError:
        current = None
    if current is None or not os.path.samestat(os.fstat(descriptor), current):
        os.close(descriptor)  # the file was removed or replaced meanwhile
        return None
    return descriptor


def _open(file: Path, flags: int) -> int:
    """Open the file with a descriptor that child programs do not inherit."""
    try:
        return os.open(file, flags | os.O_CLOEXEC, 0o666)
    except PermissionError as error:
        raise UserError(
            f"{file} cannot be opened, so it is unknown whether {file.parent} is in use: change "
            "its permissions, or choose another place"
        ) from error


def _is_mine(file: Path) -> bool:
    """Return whether this process holds the lock; forget it if its file was removed or replaced."""
    if file not in _held:
        return False
    process, descriptor, _ = _held[file]
    if process != os.getpid():
        return False
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), os.stat(file)):
            return True
    del _held[file]
    os.close(descriptor)
    return False


def _canonical(file: str | Path) -> Path:
    file = Path(file)
    return file.parent.resolve() / file.name


def _holder() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_node": os.environ.get("SLURMD_NODENAME"),
        "since": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def _in_use(file: Path, what: str) -> str:
    """Return an error message with the holder, if the file names one."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
        who = f"process {holder['process']} on {holder['host']}"
        if holder["slurm_job"]:
            node = f" on node {holder['slurm_node']}" if holder["slurm_node"] else ""
            who += f", Slurm job {holder['slurm_job']}{node}"
        who += f", since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = f"another process (see who has {file} open)"
    return f"{what} is in use by {who}; wait until it has ended, stop it, or choose another place"
