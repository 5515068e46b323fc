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
from collections.abc import Sequence
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
    num_ranks = config.parallel.tensor * (config.parallel.data or 1)
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
        step = prove.num_lines(directory / "metrics.jsonl")
        kills.append(
            Kill(case, "all" if victim is None else f"rank {victim}", round(kill_after, 3), step)
        )
    checks = prove.compare(undisturbed, directory)
    return Trial(case, kills, [f"{c.what}: {c.detail}" for c in checks if not c.equal])


def trials(cases: Sequence[str], num_kills: int, directory: Path, seed: int) -> list[Trial]:
    """Trials of the cases in turn, until there are so many kills."""
    draw, done, undisturbed = random.Random(seed), [], {}
    while sum(len(trial.kills) for trial in done) < num_kills:
        case = cases[len(done) % len(cases)]
        if case not in undisturbed:
            whole = directory / f"undisturbed_{len(undisturbed)}"
            undisturbed[case] = whole, run_ranks(case, whole)
        run = directory / f"killed_{len(done)}"
        done.append(killed_until_done(case, run, *undisturbed[case], draw))
        print(f"{case}: {len(done[-1].kills)} kills, differs: {done[-1].differs or 'nothing'}")
        if not done[-1].differs:
            shutil.rmtree(run)
    return done


def main() -> int:
    """Exit code 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        done = trials(list(CASES), options.kills, Path(directory), options.seed)
    kills = [dataclasses.asdict(kill) for trial in done for kill in trial.kills]
    differ = [dataclasses.asdict(trial) for trial in done if trial.differs]
    print(f"{len(kills)} kills of {len(done)} runs; {len(differ)} differ from an undisturbed run")
    if options.out:
        result = {
            "command": f"python tools/kill_runs.py --kills {options.kills} --seed {options.seed}",
            "machine": machine.describe(),
            "kills": len(kills),
            "runs": len(done),
            "runs_that_differ": differ,
            "each": kills,
        }
        write_text(options.out, json.dumps(result, indent=1) + "\n")
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
