"""The runs of a comparison as tasks of a Slurm job array: `compare --executor slurm`.

    DIR/array/N.sbatch      the script submitted as array N
    DIR/array/N.runs        its runs, in the order of its tasks
    DIR/array/N_TASK.out    output of a task's script; N_TASK.code has its exit code
    DIR/ARM/SEED/train.log  output of the ranks

Requires sbatch and squeue on this machine, and a file system that all nodes share.  Interrupting
the command does not cancel the array: the same command waits for it again, and submits only runs
that are neither finished nor queued.  A job that is stopped before its time limit is requeued and
resumes.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import sleep

from megatron_prepo.compare.planned_run import PlannedRun
from megatron_prepo.config import literal
from megatron_prepo.errors import UserError
from megatron_prepo.launch import slurm_time
from megatron_prepo.launch.peers import UNREACHABLE_EXIT_CODE
from megatron_prepo.rollout import placement

POLL_SECONDS = 5.0
ANSWER_SECONDS = 120.0
"""Deadline for an answer of sbatch and squeue."""
SHOW_AFTER = 60
"""Polls without an answer of squeue after which the command gives up; the array keeps running."""

SCRIPT = """#!/bin/bash
{flags}
set -euo pipefail

case $SLURM_ARRAY_TASK_ID in
{cases}
esac

code=0
srun --wait=60 --kill-on-bad-exit=1 --open-mode=append --output="$run_dir/train.log" \\
    {python} -m megatron_prepo.launch.rank "${{words[@]}}" || code=$?

# {unreachable}: unreachable machine; 138: the signal to save came before Python could handle it
unfinished=
((code != {unreachable} && code != 138)) || unfinished=yes
((code != 0)) || [ -f "$run_dir/summary.json" ] || unfinished=yes
if [ "$unfinished" ]; then
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "$code" >{directory}/"${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID.code"
fi
exit "$code"
"""


@dataclass(frozen=True)
class Slurm:
    """Options of the array's jobs."""

    account: str | None = None
    partition: str | None = None
    time: str = "04:00:00"
    gpus_per_node: int = 8
    options: tuple[str, ...] = ()
    """Further options of sbatch, such as `--mem=64G`."""


def run_all(
    waiting: Sequence[PlannedRun],
    config_path: str | Path,
    directory: Path,
    slurm: Slurm,
    jobs: int | None = None,
) -> Generator[tuple[PlannedRun, int], None, None]:
    """Submit runs that are not queued, wait for all, and yield each and its exit code when it ends.

    Up to `jobs` of them run at a time.

    Raises UserError for runs that cannot be jobs, and for jobs that Slurm refuses.
    """
    if not waiting:
        return
    place = (directory / "array").resolve()
    place.mkdir(parents=True, exist_ok=True)
    queued = _queued(place, waiting)
    new = [run for run in waiting if run.name not in queued]
    if new:
        number = _submit(new, script(new, config_path, place, slurm, jobs), place)
        queued |= {run.name: f"{number}_{task}" for task, run in enumerate(new)}
    try:
        yield from _ends(waiting, queued, place)
    except KeyboardInterrupt:
        numbers = " ".join(sorted({task.partition("_")[0] for task in queued.values()}))
        print(
            f"the jobs keep running: the same command collects their results, scancel {numbers} "
            "cancels them",
            file=sys.stderr,
        )
        raise


def script(
    runs: Sequence[PlannedRun],
    config_path: str | Path,
    place: Path,
    slurm: Slurm,
    jobs: int | None = None,
) -> str:
    """Return the array's script; raise UserError for runs that cannot be jobs."""
    config = runs[0].config
    ranks = config.parallel.num_ranks
    if any(run.config.parallel.num_ranks != ranks for run in runs):
        raise UserError(
            "--executor slurm: all runs of a comparison must have the same number of ranks"
        )
    where = placement.place(config, gpus_per_node=slurm.gpus_per_node)
    placement.check_transport(config.weight_sync.transport, where)
    if where.started_by == "job":
        raise UserError(
            f"a run on {where.nodes} nodes starts no SGLang servers: list them in servers.urls, or "
            "use python -m megatron_prepo.launch for each run"
        )
    signal = slurm_time.warning(config.checkpoint.grace_seconds)
    slurm_time.check(slurm.time, signal)
    flags = [
        "--job-name=megatron-prepo-compare",
        f"--array=0-{len(runs) - 1}" + (f"%{jobs}" if jobs else ""),
        f"--nodes={where.nodes}",
        f"--ntasks-per-node={where.ranks_per_node}",
        f"--gpus-per-node={where.gpus_per_node}",
        *(["--exclusive", "--mem=0"] if where.gpus_per_node == slurm.gpus_per_node else []),
        f"--time={slurm.time}",
        f"--signal={signal}",
        "--requeue",
        "--open-mode=append",
        f"--output={shlex.quote(f'{place}/%A_%a.out')}",
        *([f"--account={slurm.account}"] if slurm.account else []),
        *([f"--partition={slurm.partition}"] if slurm.partition else []),
        *slurm.options,
    ]
    cases = []
    for task, run in enumerate(runs):
        run_dir = run.directory.resolve()
        words = [str(config_path), *run.overrides, f"run.dir={literal(run_dir)}"]
        cases.append(f"{task}) run_dir={shlex.quote(str(run_dir))} words=({shlex.join(words)}) ;;")
    return SCRIPT.format(
        flags="\n".join(f"#SBATCH {flag}" for flag in flags),
        cases="\n".join(cases),
        python=shlex.quote(sys.executable),
        unreachable=UNREACHABLE_EXIT_CODE,
        directory=shlex.quote(str(place)),
    )


def _submit(runs: Sequence[PlannedRun], text: str, place: Path) -> str:
    """Submit the array and return its number."""
    for run in runs:
        run.make_directory()
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"],
            input=text,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--executor slurm needs sbatch: {error}") from error
    if done.returncode:
        reason = "; ".join(done.stderr.replace("sbatch: error: ", "").splitlines())
        raise UserError(f"sbatch refuses the jobs: {reason}")
    number = done.stdout.strip().partition(";")[0]
    (place / f"{number}.sbatch").write_text(text)
    (place / f"{number}.runs").write_text(json.dumps([run.name for run in runs]))
    print(f"submitted: {len(runs)} runs as the tasks of job array {number}", file=sys.stderr)
    return number


def _queued(place: Path, waiting: Sequence[PlannedRun]) -> dict[str, str]:
    """Return the tasks of earlier arrays that have not ended, by the names of their runs."""
    names = {run.name for run in waiting}
    queued = {}
    for path in place.glob("*.runs"):
        number = path.stem
        alive = _alive(number)
        if alive is None:
            raise UserError("squeue does not answer, and jobs may be queued: try again later")
        for task, name in enumerate(json.loads(path.read_text())):
            if name in names and f"{number}_{task}" in alive:
                queued[name] = f"{number}_{task}"
    return queued


def _alive(number: str) -> set[str] | None:
    """Return the tasks of an array that have not ended; None if squeue does not answer."""
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--array", f"--jobs={number}", "--format=%F_%K"],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None
    except OSError as error:
        raise UserError(f"--executor slurm needs squeue: {error}") from error
    if done.returncode:
        return set() if "Invalid job id" in done.stderr else None
    return set(done.stdout.split())


def _ends(
    waiting: Sequence[PlannedRun], queued: dict[str, str], place: Path
) -> Iterator[tuple[PlannedRun, int]]:
    left, silent = list(waiting), 0
    while left:
        alive: set[str] = set()
        for number in {queued[run.name].partition("_")[0] for run in left}:
            tasks = _alive(number)
            silent = silent + 1 if tasks is None else 0
            if silent > SHOW_AFTER:
                raise UserError("squeue does not answer; the same command collects the runs later")
            # without an answer, assume that no job has ended
            alive |= {queued[run.name] for run in left} if tasks is None else tasks
        for run in [run for run in left if queued[run.name] not in alive]:
            left.remove(run)
            yield run, _exit_code(run, place / f"{queued[run.name]}.code")
        if left:
            sleep(POLL_SECONDS)


def _exit_code(run: PlannedRun, written: Path) -> int:
    """Return the exit code of an ended task; 1 if it was cancelled or its node failed."""
    if (run.directory / "summary.json").is_file():
        return 0
    return int(written.read_text()) if written.is_file() else 1
