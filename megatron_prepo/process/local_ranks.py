"""Start the ranks of a job on this machine, and stop all of them if one fails.

Not used under `torchrun` or a cluster's launcher.  Rank 0 prints to the terminal, all other ranks
to `logs/`.  A rank that fails writes its error to a pipe, not to the terminal; the launcher then
prints the error of the rank that failed first.  All errors are in `logs/rank_N.error`.
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
from megatron_prepo.process import activity
from megatron_prepo.process.ports import free_port

ERROR_PIPE = "MEGATRON_PREPO_ERROR_PIPE"
"""Descriptor to which a rank writes its error: unlike a file, a pipe works on a full disk."""
MAX_ERROR_BYTES = 60_000
"""A pipe holds 65,536 bytes, and the launcher does not read it before the rank has ended."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals on which ranks save and exit."""
INTERRUPTED_EXIT_CODE = 130
"""Exit code of a command that Ctrl-C has stopped, as of a shell."""
STOPPED_EXIT_CODE = 75
"""Exit code of a run that stopped on request and can be resumed: EX_TEMPFAIL of sysexits.h."""
STOPPING = (
    "\nCtrl-C: the ranks stop after this step, and save it; Ctrl-C again stops them immediately"
)
LEAVING_SECONDS = 60.0
"""Maximum time between the exits of the first and the last rank after a stop signal."""
MEETING_FILE = "MEGATRON_PREPO_MEETING_FILE"
"""File by which the ranks rendezvous; torch's server for that listens on all interfaces."""


class RanksFailed(RuntimeError):
    """A rank ended with an error; the message is that error."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def start(command: Sequence[str], num_ranks: int, log_directory: Path) -> None:
    """Run `command` as ranks 0 ... num_ranks-1 and wait for all.

    If a rank fails, stops all of them and raises RanksFailed with the error of the first that
    failed.  Raises Stopped if the ranks exited on SIGTERM or SIGUSR1, which is passed on to them.
    They get SIGTERM for a first Ctrl-C; a second one raises KeyboardInterrupt.
    """
    try:
        with activity.handed_over():
            codes, asked, errors = _run(command, num_ranks, log_directory)
    except OSError as error:
        if (line := no_room(error)) is None:
            raise
        raise RanksFailed(f"error: {line}", exit_code=1) from error
    if not codes:
        return
    if _leaving(codes, asked):
        left = [rank for rank, code in codes.items() if code == STOPPED_EXIT_CODE]
        messages = _in_order(errors, left)
        raise Stopped(
            messages[0]
            if messages
            else "stopped as asked before a step could be saved; the same command resumes from the "
            "last checkpoint",
            exit_code=INTERRUPTED_EXIT_CODE if signal.SIGINT in asked else STOPPED_EXIT_CODE,
        )
    raise RanksFailed(_first_error(codes, errors, log_directory), exit_code=codes[min(codes)])


def _run(
    command: Sequence[str], num_ranks: int, log_directory: Path
) -> tuple[dict[int, int], set[int], "dict[int, Error]"]:
    """Return the nonzero exit codes, the stop signals received, and the errors by rank."""
    log_directory.mkdir(parents=True, exist_ok=True)
    # an open descriptor: errors follow a run's directory that is moved, and miss a replacement
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
    if sys.platform == "linux":  # keeps control messages on this machine, too
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
                    with _without_ctrl_c():
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
                    with suppress(
                        OSError
                    ):  # a copy for later: the error is printed even if the disk is full
                        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                        file = os.open(f"rank_{rank}.error", flags, 0o666, dir_fd=place)
                        with open(file, "w", encoding="utf-8") as left:
                            left.write(error.message + "\n")
            os.close(place)
    return codes, asked, errors


def run_rank(main: Callable[[], None]) -> int:
    """Run `main` as one rank, report its error and return its exit code.

    Under `start`, errors go to the rank's pipe.  Under torchrun or Slurm they go to stderr: a
    UserError from one rank per node only, since the ranks of a node find the same one, and Stopped
    from rank 0 only.
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
    """Return whether a rank has exited because of a stop signal.

    Until a rank handles the signal, it dies from it like any program.
    """
    return any(code == STOPPED_EXIT_CODE or -code in asked for code in codes.values())


def _wait(processes: Sequence[subprocess.Popen[bytes]], asked: set[int]) -> dict[int, int]:
    """Wait until all ranks succeed or one fails; return the nonzero exit codes by rank.

    If ranks exit because of a stop signal, the remaining ranks get LEAVING_SECONDS to do so.
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
    """Kill the ranks that still run: they hold nothing worth waiting for."""
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextmanager
def _stop_signals_go_to(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[set[int]]:
    """Pass stop signals on to the ranks, a Ctrl-C as SIGTERM; yield the signals known to them."""
    asked: set[int] = set()

    def pass_on(number: int, frame: object) -> None:
        asked.add(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    def stop(number: int, frame: object) -> None:
        if number in asked:
            raise KeyboardInterrupt
        asked.add(number)
        print(STOPPING, file=sys.stderr, flush=True)
        pass_on(signal.SIGTERM, frame)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Start processes that ignore SIGINT, which a terminal sends to the ranks, too."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True, order=True)
class Error:
    """The error that a rank wrote to its pipe."""

    at: int
    """Time in nanoseconds, by the monotonic clock that all processes share."""
    message: str


def _read(pipe: int) -> Error | None:
    """Return the error of a rank that has ended, if it wrote one."""
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError), open(pipe, "rb", buffering=0) as reader:
        at, end, message = (reader.read(1 << 16) or b"").partition(b"\n")
        if end:
            return Error(int(at), message.decode(errors="replace"))
    return None


def _in_order(errors: dict[int, Error], ranks: Iterable[int]) -> list[str]:
    """Return the error messages of these ranks, the earliest first."""
    return [error.message for error in sorted(errors[rank] for rank in ranks if rank in errors)]


def _first_error(failed: dict[int, int], errors: dict[int, Error], log_directory: Path) -> str:
    """Return how a rank was killed, with the end of its log; if none was, the earliest error."""
    messages = _in_order(errors, failed)
    killed = [rank for rank, code in failed.items() if code < 0]
    if messages and not killed:
        return messages[0]
    rank = (killed or list(failed))[0]
    code = failed[rank]
    how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
    if code == -signal.SIGKILL:
        how += " (often: out of memory)"
    log = log_directory / f"rank_{rank}.log"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:]) if log.is_file() else ""
    return f"rank {rank} died with {how}\n{tail}".strip()


def _die_with_parent() -> None:
    """Let the kernel kill this rank when its launcher ends, however that ends (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
