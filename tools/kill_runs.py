"""Kill short runs at random moments, go on with them, and compare with runs that were never killed.

    python tools/kill_runs.py --kills 100 --out benchmarks/results/kill_runs.json

A run is killed (SIGKILL, one rank or all) and gone on with until it comes to its end; then ledger,
weights, optimizer and metrics have to be those of the undisturbed run of the same settings, bit for
bit.  Ranks are forked from this process, which has imported everything: a kill then costs a second
and not the seconds of an import.  Needs no GPU, and uses none.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prepo import config as configuration
from megatron_prepo import machine, prove
from megatron_prepo.durable import write_text
from megatron_prepo.train import train

LAPTOP = Path(__file__).resolve().parents[1] / "examples" / "laptop"
SHORT = (
    f"model.hf={LAPTOP / 'base'}",
    f"data.train={LAPTOP / 'train.jsonl'}",
    f"data.eval={LAPTOP / 'eval.jsonl'}",
    "train.total_steps=4",
    "selection.num_candidates=24",
    "selection.num_selected=8",
    "rollout.samples_per_prompt=4",
    "eval.max_prompts=8",
    "eval.samples_per_prompt=1",
    "eval.every=2",
    "parallel.tensor=1",
)
CASES = {
    "prepo": ("checkpoint.every=1",),
    "foresight, a checkpoint in two steps": ("selection.method=foresight", "checkpoint.every=2"),
    "greso, one checkpoint kept": (
        "selection.method=greso",
        "checkpoint.every=1",
        "checkpoint.keep_last=1",
    ),
    "oracle, bfloat16, no checkpoint but the last": (
        "selection.method=oracle",
        "model.dtype=bfloat16",
    ),
    "tensor parallel 2": ("parallel.tensor=2", "checkpoint.every=1"),
    "data parallel 2, distributed optimizer": (
        "parallel.data=2",
        "optimizer.use_distributed_optimizer=true",
        "checkpoint.every=2",
    ),
}
DEADLINE_SECONDS = 300.0


@dataclass(frozen=True)
class Kill:
    """One kill of one run."""

    case: str
    victim: str
    seconds: float
    """After the start of the ranks."""
    step: int
    """Steps in the metrics by then, counted from the beginning of the run."""


@dataclass(frozen=True)
class Trial:
    """A run, killed until it came to its end."""

    case: str
    kills: list[Kill]
    differs: list[str]
    """What was not that of the undisturbed run."""


def run_ranks(
    case: str, directory: Path, *, kill_after: float | None = None, victim: int | None = None
) -> float | None:
    """The run's ranks, from where it is to its end; returns the seconds that took, None if killed.

    `victim` is a rank, or None for all; what then is left of the job is killed, as a launcher does.
    """
    overrides = [*SHORT, *CASES[case], f"run.dir={directory}"]
    config = configuration.load(LAPTOP / "prepo.yaml", overrides)
    num_ranks = config.parallel.num_ranks
    begin, port = time.monotonic(), _free_port()
    ranks = [_fork(config, rank, num_ranks, port, directory) for rank in range(num_ranks)]
    running = dict.fromkeys(ranks)
    try:
        while running:
            seconds = time.monotonic() - begin
            if kill_after is not None and seconds > kill_after:
                os.kill(ranks[victim] if victim is not None else ranks[0], signal.SIGKILL)
                return None
            assert seconds < DEADLINE_SECONDS, f"{directory} is still running"
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    running.pop(pid)
                    log = Path(f"{directory}.log").read_text()
                    assert status == 0, f"a rank of {directory} failed:\n{log[-3000:]}"
            time.sleep(0.005)
        return seconds
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def killed_until_done(
    case: str, directory: Path, undisturbed: Path, seconds: float, draw: random.Random
) -> Trial:
    """One trial; `seconds` is how long the undisturbed run took."""
    kills = []
    while True:
        kill_after = draw.uniform(0.0, 1.2 * seconds)
        victim = draw.choice([None, 0, 1]) if case.endswith(("2", "optimizer")) else None
        if run_ranks(case, directory, kill_after=kill_after, victim=victim) is not None:
            break
        step, who = prove.num_lines(directory / "metrics.jsonl"), "all"
        if victim is not None:
            who = f"rank {victim}"
        kills.append(Kill(case, who, round(kill_after, 3), step))
        if (directory / "summary.json").exists():
            break  # killed when all was done
    checks = prove.compare(undisturbed, directory)
    return Trial(case, kills, [f"{c.what}: {c.detail}" for c in checks if not c.equal])


def trials(cases: Sequence[str], num_kills: int, directory: Path, seed: int) -> Iterator[Trial]:
    """Trials of the cases in turn, until there are so many kills."""
    draw, count, number, undisturbed = random.Random(seed), 0, 0, {}
    while count < num_kills:
        case = cases[number % len(cases)]
        if case not in undisturbed:
            whole = directory / f"undisturbed_{len(undisturbed)}"
            undisturbed[case] = whole, run_ranks(case, whole)
        run = directory / f"killed_{number}"
        trial = killed_until_done(case, run, *undisturbed[case], draw)
        if not trial.differs:
            shutil.rmtree(run)
        count, number = count + len(trial.kills), number + 1
        yield trial


def main() -> int:
    """Exit code 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="written anew after every run")
    options = parser.parse_args()
    kills, differ, num_runs = [], [], 0
    with tempfile.TemporaryDirectory() as directory:
        for trial in trials(list(CASES), options.kills, Path(directory), options.seed):
            num_runs += 1
            kills += [dataclasses.asdict(kill) for kill in trial.kills]
            differ += [dataclasses.asdict(trial)] if trial.differs else []
            print(f"{trial.case}: {len(trial.kills)} kills, differs: {trial.differs or 'nothing'}")
            if options.out:
                result = {
                    "command": f"tools/kill_runs.py --kills {options.kills} --seed {options.seed}",
                    "machine": machine.describe(),
                    "kills": len(kills),
                    "runs": num_runs,
                    "runs_that_differ": differ,
                    "each": kills,
                }
                write_text(options.out, json.dumps(result, indent=1) + "\n")
    print(f"{len(kills)} kills of {num_runs} runs; {len(differ)} differ from an undisturbed run")
    return 1 if differ else 0


def _fork(config, rank: int, num_ranks: int, port: int, directory: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(f"{directory}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "CUDA_VISIBLE_DEVICES": "",
        }
        train(config)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
