"""Run a function on several gloo ranks: fresh processes, one deadline, and no leftover processes.

    answers = on_ranks(4, measure, "argument")      # [measure("argument") on rank 0, ... on rank 3]

`measure` stands at the top level of a module; arguments and answers have to be picklable.  Ranks
are forked from a process that has imported torch and Megatron once and has no groups yet: they
start in hundredths of a second, and a case can have its own ranks.  (What outlives a group in one
process, such as threads and connections, accumulates.)  Where cases share ranks:

    for case in cases:
        if join(case.num_ranks):        # a new default process group of the first so many ranks
            ...
            torch.distributed.destroy_process_group()

Groups connect through a file, not a port, so that nothing else on the machine can interfere.
"""

import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

_groups = itertools.count()
_starter = multiprocessing.get_context("forkserver")
if not torch.cuda.is_available():  # a GPU in use here cannot be used by forks
    _starter.set_forkserver_preload(["ranks_start"])


class RankError(AssertionError):
    """A rank raised, died, or had not finished at the deadline."""


def on_ranks(num_ranks: int, function: Callable, *args, deadline_s: float = 600.0) -> list:
    """Return what `function(*args)` returned on each rank; a `RankError` shows the first
    failure."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "call").write_bytes(pickle.dumps((function, args, deadline_s)))
        ranks = [_start(Path(directory), rank, num_ranks) for rank in range(num_ranks)]
        try:
            problem = _wait(ranks, Path(directory), deadline_s)
        finally:
            for rank in ranks:
                _end(rank)
        if problem:
            rank, what = problem
            output = (Path(directory) / f"output-{rank}").read_text(errors="replace")
            raise RankError(f"rank {rank} of {num_ranks} {what}; its output:\n{output[-6000:]}")
        return [
            pickle.loads(Path(directory, f"answer-{rank}").read_bytes())
            for rank in range(num_ranks)
        ]


def join(num_ranks: int, timeout_s: float = 120.0) -> bool:
    """Create, in a rank, a gloo group of the first `num_ranks` ranks; False on a rank outside it.

    To be called on all ranks in the same order.  `WORLD_SIZE` follows.
    """
    rank, file = int(os.environ["RANK"]), Path(os.environ["RANKS_DIR"], f"group-{next(_groups)}")
    if rank >= num_ranks:
        return False
    os.environ["WORLD_SIZE"] = str(num_ranks)
    dist.init_process_group(
        "gloo",
        init_method=file.as_uri(),
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    return True


def _start(directory: Path, rank: int, num_ranks: int) -> ForkServerProcess:
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "RANKS_DIR": str(directory),
        "OMP_NUM_THREADS": os.environ.get("TEST_THREADS", "1"),
        # what a test has put there first, such as a package that stands in for another
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *sys.path])),
    }
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()  # once; what it imports looks at the environment
    process = _starter.Process(target=_main, args=(directory, environment))
    process.start()
    return process


def _wait(
    ranks: list[ForkServerProcess], directory: Path, deadline_s: float
) -> tuple[int, str] | None:
    """Return the first rank to have failed and how, or None when all have ended well."""
    end = time.monotonic() + deadline_s
    while True:
        codes = [rank.exitcode for rank in ranks]
        if any(codes):
            # a rank that raised takes its partners with it, and they may be sooner to end
            raised = sorted(directory.glob("raised-*"), key=lambda file: file.stat().st_mtime_ns)
            if raised:
                return int(raised[0].name.removeprefix("raised-")), "raised"
            rank = next(rank for rank, code in enumerate(codes) if code)
            return rank, f"ended with code {codes[rank]}"
        if None not in codes:
            return None
        if time.monotonic() > end:
            return codes.index(None), f"was not done after {deadline_s:.0f} s"
        time.sleep(0.02)


def _end(rank: ForkServerProcess) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and has no children left
        os.killpg(rank.pid, signal.SIGKILL)
    rank.kill()  # a rank that does not have its own process group yet
    rank.join()


def _main(directory: Path, environment: dict[str, str]) -> None:
    os.setsid()  # so that a rank's own children end with it
    output = os.open(directory / f"output-{environment['RANK']}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(environment)
    function, args, deadline_s = pickle.loads((directory / "call").read_bytes())
    signal.alarm(int(deadline_s) + 30)  # ends this rank even if no process waits for it any more
    try:
        answer = function(*args)
    except BaseException:
        (directory / f"raised-{os.environ['RANK']}").touch()
        raise
    aside = directory / f"partial-{os.environ['RANK']}"
    aside.write_bytes(pickle.dumps(answer))
    aside.rename(directory / f"answer-{os.environ['RANK']}")
