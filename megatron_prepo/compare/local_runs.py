"""The runs of a comparison as processes on this machine, several at a time."""

import os
import signal
import subprocess
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_prepo import config as configuration
from megatron_prepo.compare.planned_run import LOG, PlannedRun
from megatron_prepo.process import activity

GRACE_SECONDS = 10.0

Process = subprocess.Popen[bytes]


def run_all(
    waiting: Sequence[PlannedRun], config_path: str | Path, train: Sequence[str], jobs: int | None
) -> Generator[tuple[PlannedRun, int], None, None]:
    """Run up to `jobs` at a time; yield each run and its exit code when it ends.

    `train` is the command that starts one run.  However the iteration is left, no process survives.
    """
    if not waiting:
        return
    num_ranks = waiting[0].config.parallel.num_ranks
    devices = visible_devices()
    jobs = jobs or max(1, (len(devices) or os.cpu_count() or 1) // num_ranks)
    queue = list(waiting)
    running: dict[int, tuple[PlannedRun, Process]] = {}
    with terminated_like_interrupted(), activity.doing(lambda: _names(running)):
        try:
            while queue or running:
                while queue and len(running) < jobs:
                    slot = min(set(range(jobs)) - set(running))
                    running[slot] = (
                        queue[0],
                        start(queue.pop(0), config_path, train, devices, slot),
                    )
                ended = [s for s, (_, process) in running.items() if process.poll() is not None]
                for slot in ended:
                    run, process = running.pop(slot)
                    end([process])  # kills processes that a failed run may have left in its group
                    yield run, process.returncode
                if not ended:
                    time.sleep(0.1)
        finally:
            end([process for _, process in running.values()])


def start(
    run: PlannedRun, config_path: str | Path, train: Sequence[str], devices: list[str], slot: int
) -> Process:
    """Start the run in a new process group, with its part of the devices."""
    run.make_directory()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    if devices:
        num_ranks = run.config.parallel.num_ranks
        mine = [devices[(slot * num_ranks + i) % len(devices)] for i in range(num_ranks)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))
    where = [f"run.dir={configuration.literal(run.directory)}", "run.overwrite=true"]
    with open(run.directory / LOG, "a") as log:
        return subprocess.Popen(
            [*train, str(config_path), *run.overrides, *where],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _names(running: Mapping[int, tuple[PlannedRun, Process]]) -> str:
    return ", ".join(run.name for run, _ in list(running.values())) or "starting runs"


def visible_devices() -> list[str]:
    """Return the usable GPUs as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def end(processes: Sequence[Process]) -> None:
    """Ask all process groups to stop and kill them after GRACE_SECONDS, or on a second Ctrl-C."""
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        for process in processes:
            signal_group(process, signal.SIGTERM)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            signal_group(process, signal.SIGKILL)
            process.wait()


def signal_group(process: Process, number: int) -> None:
    """Send a signal to the process and all that it started, if any of them is alive."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C within the block, so that the runs are stopped too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
