"""Start the ranks of a job on this machine, and end them all when one fails.

Under `torchrun` or a cluster's launcher this file has no part.  Rank 0 has the terminal; the others
print to `logs/`.  A rank that fails leaves its error in a file and nothing on the terminal, so that
what is shown, last, is the error of the rank that failed first.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_prepo.errors import UserError

ERROR_FILE = "MEGATRON_PREPO_ERROR_FILE"
GRACE_SECONDS = 5.0
MEETING_FILE = "MEGATRON_PREPO_MEETING_FILE"
"""Where the ranks find each other: torch's own server for that listens on all interfaces."""


class RanksFailed(RuntimeError):
    """A rank ended with an error; the message is that error."""


def start(command: Sequence[str], num_ranks: int, log_directory: Path) -> None:
    """Run `command` as ranks 0 ... num_ranks-1 and wait for all.

    Raises RanksFailed with the error of the first rank that failed, after ending the others.
    """
    log_directory.mkdir(parents=True, exist_ok=True)
    processes, logs, failed = [], [], {}
    meeting_file = Path(tempfile.mkdtemp(prefix="megatron-prepo-")) / "ranks"
    threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        MEETING_FILE: str(meeting_file),
    }
    if sys.platform == "linux":  # control messages stay on this machine, too
        shared["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    try:
        for rank in range(num_ranks):
            error_file = log_directory / f"rank_{rank}.error"
            error_file.unlink(missing_ok=True)
            log = None
            if rank > 0:
                log = open(log_directory / f"rank_{rank}.log", "w")  # noqa: SIM115
                logs.append(log)
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_FILE: str(error_file)}
            processes.append(
                subprocess.Popen(
                    command, env={**os.environ, **shared, **own}, stdout=log, stderr=log
                )
            )
        failed = _wait(processes)
    finally:
        _end(processes)
        shutil.rmtree(meeting_file.parent)
        for log in logs:
            log.close()
    if failed:
        raise RanksFailed(_first_error(failed, log_directory))


def run_rank(main: Callable[[], None]) -> int:
    """Run `main` as one rank and return its exit code; errors go where the launcher looks.

    Started by `start`: to the rank's error file.  Started by torchrun: to stderr, a user's error
    from rank 0 only, since every rank finds the same.
    """
    error_file = os.environ.get(ERROR_FILE)
    rank = int(os.environ.get("RANK", "0"))
    if error_file:
        _die_with_parent()
    try:
        main()
        return 0
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        code, message = 2, f"error: {error}"
    except Exception:
        code, message = 1, f"rank {rank} failed:\n{traceback.format_exc()}"
    if error_file:
        Path(error_file).write_text(f"{time.time_ns()}\n{message}")
    elif code == 1 or rank == 0:
        print(message, file=sys.stderr)
    return code


def _wait(processes: Sequence[subprocess.Popen]) -> dict[int, int]:
    """Until all have ended well, or some badly: exit codes of those, by rank."""
    while True:
        codes = [process.poll() for process in processes]
        failed = {rank: code for rank, code in enumerate(codes) if code}
        if failed or None not in codes:
            return failed
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Ask those that still run to stop, then kill them."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _first_error(failed: dict[int, int], log_directory: Path) -> str:
    """How a rank was killed, with the end of its log; if none was, the earliest error file."""
    error_files = [log_directory / f"rank_{rank}.error" for rank in failed]
    errors = [path.read_text().partition("\n") for path in error_files if path.is_file()]
    killed = [rank for rank, code in failed.items() if code < 0]
    if errors and not killed:
        return min(errors, key=lambda error: int(error[0]))[2]
    rank = (killed or list(failed))[0]
    code = failed[rank]
    how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
    if code == -signal.SIGKILL:
        how += " (often: out of memory)"
    log = log_directory / f"rank_{rank}.log"
    tail = "\n".join(log.read_text().splitlines()[-10:]) if log.is_file() else ""
    return f"rank {rank} died with {how}\n{tail}".strip()


def _die_with_parent() -> None:
    """Linux: a rank does not outlive its launcher, however that one ended."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
