"""Start the ranks of a job on this machine, and end them all when one fails.

Under `torchrun` or a cluster's launcher this file has no part.  Rank 0 has the terminal; the others
print to `logs/`.  A rank that fails leaves its error in a pipe and nothing on the terminal, so that
what is shown, last, is the error of the rank that failed first; all are in `logs/rank_N.error`.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_prepo.errors import Stopped, UserError, no_room
from megatron_prepo.process.ports import free_port

ERROR_PIPE = "MEGATRON_PREPO_ERROR_PIPE"
"""Descriptor on which a rank leaves its error: a pipe has room where a full disk has none."""
MAX_ERROR_BYTES = 60_000
"""A pipe holds 65,536, and nobody reads before the rank has ended."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Asked so, ranks save and leave."""
STOPPED_EXIT_CODE = 75
"""Of a run that has stopped as asked and can go on: EX_TEMPFAIL of sysexits.h, "try again"."""
LEAVING_SECONDS = 60.0
"""From the first rank that leaves as asked to the last."""
MEETING_FILE = "MEGATRON_PREPO_MEETING_FILE"
"""Where the ranks find each other: torch's own server for that listens on all interfaces."""


class RanksFailed(RuntimeError):
    """A rank ended with an error; the message is that error."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def start(command: Sequence[str], num_ranks: int, log_directory: Path) -> None:
    """Run `command` as ranks 0 ... num_ranks-1 and wait for all.

    Raises RanksFailed with the error of the first rank that failed, after ending the others, and
    Stopped if SIGTERM or SIGUSR1, passed on to the ranks, or to one of them, made them leave.
    """
    try:
        codes, asked, errors = _run(command, num_ranks, log_directory)
    except OSError as error:
        if (line := no_room(error)) is None:
            raise
        raise RanksFailed(f"error: {line}", exit_code=1) from error
    if not codes:
        return
    if _leaving(codes, asked):
        left = [rank for rank, code in codes.items() if code == STOPPED_EXIT_CODE]
        said = _in_order(errors, left)
        raise Stopped(
            said[0]
            if said
            else "stopped as asked before a step could be saved; the same command "
            "goes on from the last checkpoint",
            exit_code=STOPPED_EXIT_CODE,
        )
    raise RanksFailed(_first_error(codes, errors, log_directory), exit_code=codes[min(codes)])


def _run(
    command: Sequence[str], num_ranks: int, log_directory: Path
) -> tuple[dict[int, int], set[int], "dict[int, Error]"]:
    """Exit codes of the ranks that did not end well, stop signals that came, errors by rank."""
    log_directory.mkdir(parents=True, exist_ok=True)
    # errors go where it goes, if the run's directory is moved, and not to what takes its place
    place = os.open(log_directory, os.O_RDONLY | os.O_DIRECTORY)
    processes: list[subprocess.Popen[bytes]] = []
    logs, codes, pipes, errors = [], {}, [], {}
    meeting_file = Path(tempfile.mkdtemp(prefix="megatron-prepo-")) / "ranks"
    threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        MEETING_FILE: str(meeting_file),
    }
    if sys.platform == "linux":  # control messages stay on this machine, too
        shared["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    with _stop_signals_go_to(processes) as asked:
        try:
            for rank in range(num_ranks):
                (log_directory / f"rank_{rank}.error").unlink(missing_ok=True)
                log = None
                if rank > 0:
                    log = open(log_directory / f"rank_{rank}.log", "w")  # noqa: SIM115
                    logs.append(log)
                reader, writer = os.pipe()
                pipes.append(reader)
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_PIPE: str(writer)}
                try:
                    processes.append(
                        subprocess.Popen(
                            command,
                            env={**os.environ, **shared, **own},
                            stdout=log,
                            stderr=log,
                            pass_fds=[writer],
                        )
                    )
                finally:
                    os.close(writer)
            codes = _wait(processes, asked)
        finally:
            _end(processes)
            shutil.rmtree(meeting_file.parent)
            for log in logs:
                log.close()
            for rank, pipe in enumerate(pipes):
                if error := _read(pipe):
                    errors[rank] = error
                    with suppress(OSError):  # for later; it is shown even if the disk is full
                        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                        file = os.open(f"rank_{rank}.error", flags, 0o666, dir_fd=place)
                        with open(file, "w", encoding="utf-8") as left:
                            left.write(error.message + "\n")
            os.close(place)
    return codes, asked, errors


def run_rank(main: Callable[[], None]) -> int:
    """Run `main` as one rank and return its exit code; errors go where the launcher looks.

    Started by `start`: to the rank's pipe.  Started by torchrun or Slurm: to stderr, a user's
    error from one rank per node only, since the ranks of a node find the same, and that the run was
    stopped from rank 0.
    """
    pipe = os.environ.get(ERROR_PIPE)
    rank = os.environ.get("RANK", "0")
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    if pipe:
        _die_with_parent()
    try:
        main()
        return 0
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        code, message = 2, f"error: {error}"
    except Stopped as error:
        code, message = error.exit_code, str(error)
        speaks = rank == "0"
    except Exception as error:
        code, message = 1, f"rank {rank} failed:\n{traceback.format_exc()}"
        if line := no_room(error):
            message = f"error: rank {rank}: {line}"
    if pipe:
        words = f"{time.monotonic_ns()}\n{message}".encode(errors="backslashreplace")
        os.write(int(pipe), words[:MAX_ERROR_BYTES])
    elif code == 1 or speaks:
        print(message, file=sys.stderr)
    return code


def _leaving(codes: dict[int, int], asked: set[int]) -> bool:
    """Whether a rank has left because it was asked to.

    Before it listens, a signal ends it as it would end any program.
    """
    return any(code == STOPPED_EXIT_CODE or -code in asked for code in codes.values())


def _wait(processes: Sequence[subprocess.Popen[bytes]], asked: set[int]) -> dict[int, int]:
    """Until all have ended well, or some badly: exit codes of those, by rank.

    Ranks that leave as asked wait for one another.
    """
    since = None
    while True:
        codes = [process.poll() for process in processes]
        failed = {rank: code for rank, code in enumerate(codes) if code}
        if None not in codes or (failed and not _leaving(failed, asked)):
            return failed
        if failed:
            since = since or time.monotonic()
            if time.monotonic() - since > LEAVING_SECONDS:
                return failed
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill those that still run: what they hold is not worth waiting for."""
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextmanager
def _stop_signals_go_to(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[set[int]]:
    """Pass signals that ask for a stop on to the ranks; gives the set of those that came."""
    asked: set[int] = set()

    def pass_on(number: int, frame: object) -> None:
        asked.add(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True, order=True)
class Error:
    """What a rank has left in its pipe."""

    at: int
    """Nanoseconds of the monotonic clock, the same for all processes."""
    message: str


def _read(pipe: int) -> Error | None:
    """The error of a rank that has ended, if it left one."""
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError), open(pipe, "rb", buffering=0) as reader:
        at, end, message = (reader.read(1 << 16) or b"").partition(b"\n")
        if end:
            return Error(int(at), message.decode(errors="replace"))
    return None


def _in_order(errors: dict[int, Error], ranks: Iterable[int]) -> list[str]:
    """What these ranks have left, the earliest first."""
    return [error.message for error in sorted(errors[rank] for rank in ranks if rank in errors)]


def _first_error(failed: dict[int, int], errors: dict[int, Error], log_directory: Path) -> str:
    """How a rank was killed, with the end of its log; if none was, the earliest error."""
    said = _in_order(errors, failed)
    killed = [rank for rank, code in failed.items() if code < 0]
    if said and not killed:
        return said[0]
    rank = (killed or list(failed))[0]
    code = failed[rank]
    how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
    if code == -signal.SIGKILL:
        how += " (often: out of memory)"
    log = log_directory / f"rank_{rank}.log"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:]) if log.is_file() else ""
    return f"rank {rank} died with {how}\n{tail}".strip()


def _die_with_parent() -> None:
    """Linux: a rank does not outlive its launcher, however that one ended."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
