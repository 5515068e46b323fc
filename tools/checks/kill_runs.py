"""Kill processes of short runs at random times, and compare with uninterrupted runs.

    python tools/checks/kill_runs.py --kills 100 --out benchmarks/results/kill_runs.json

Victims (each by SIGKILL): all ranks simultaneously; one rank, after which all further ranks are
killed, as by a launcher; a grading process; a process of a rollout server, which is the fake one of
`tests`, started by the run.  After the death of a grading process the run must continue; after that
of a server it may also stop.  A run that stopped early is resumed until it is finished; then
ledger, weights, optimizer and metrics must be those of the uninterrupted run with the same
settings, bit for bit.  Ranks are forked from this process, which has imported all modules: a kill
then takes a second and not the time of an import.  Neither needs nor uses a GPU.
"""

import argparse
import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_prepo import config as configuration
from megatron_prepo.debug import resume_check as prove
from megatron_prepo.errors import Stopped
from megatron_prepo.files import ownership
from megatron_prepo.files.atomic import write_text
from megatron_prepo.process import machine
from megatron_prepo.process.ports import free_port
from megatron_prepo.rollout.engine import EngineError
from megatron_prepo.train import train
from megatron_prepo.train_async import train_overlapped

REPOSITORY = Path(__file__).resolve().parents[2]
LAPTOP = REPOSITORY / "examples" / "laptop"
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
SERVERS = (
    "rollout.engine=sglang",
    f"servers.python={sys.executable}",
    "servers.count=2",
    "servers.concurrency=4",
    "weight_sync.verify=never",
)
CASES = {
    "tensor parallel 2, two servers": (*SERVERS, "parallel.tensor=2", "checkpoint.every=1"),
    "prepo": ("checkpoint.every=1",),
    "foresight, a checkpoint in two steps": ("selection.method=foresight", "checkpoint.every=2"),
    "one server, greso, no checkpoint but the last": (
        *SERVERS,
        "servers.count=1",
        "selection.method=greso",
    ),
    "greso, one checkpoint kept": (
        "selection.method=greso",
        "checkpoint.every=1",
        "checkpoint.keep_last=1",
    ),
    "oracle, bfloat16, no checkpoint but the last": (
        "selection.method=oracle",
        "model.dtype=bfloat16",
    ),
    "overlapped, two servers": (
        *SERVERS,
        "train.overlap=true",
        "loss.importance=truncated",
        "checkpoint.every=1",
    ),
    "tensor parallel 2": ("parallel.tensor=2", "checkpoint.every=1"),
    "data parallel 2, distributed optimizer": (
        "parallel.data=2",
        "optimizer.use_distributed_optimizer=true",
        "checkpoint.every=2",
    ),
}
KINDS = ("all", "rank", "grader", "engine")
SECONDS_OF_A_COMPLETION = 0.1
"""Delay in a fake server, so that kills also occur during rollouts."""
ENGINE_FAILED = 3
"""Exit code of a rank whose engine failed, in place of 1."""
DEADLINE_SECONDS = 300.0
MOST_KILLS = 6
"""Maximum number of kills per run, so that they are not all in one long run."""


@dataclass(frozen=True)
class Kill:
    """One kill of one run."""

    case: str
    victim: str
    seconds: float
    """Time after the start of the ranks."""
    step: int
    """Number of steps in the metrics at that time, counted from the start of the run."""


@dataclass(frozen=True)
class Trial:
    """A run, and its kills until it was finished."""

    case: str
    kills: list[Kill]
    differs: list[str]
    """Outputs that differ from those of the uninterrupted run."""


@dataclass
class Victims:
    """Kinds of victims in random order, each equally often; a kind is kept until it is killed."""

    draw: random.Random
    left: list[str] = field(default_factory=list)

    def next(self, case: str) -> str:
        """Return the next kind that exists in the case."""
        has = {"all": True, "rank": num_ranks(case) > 1, "grader": True, "engine": _servers(case)}
        while not any(has[kind] for kind in self.left):
            self.left += self.draw.sample(KINDS, len(KINDS))
        return next(kind for kind in self.left if has[kind])


class Ranks:
    """The ranks of a run, started from its current state, and their processes to kill."""

    def __init__(self, case: str, directory: Path):
        self.case, self.directory = case, directory
        port = free_port()
        self.pids = [
            _fork(config_of(case, directory), rank, num_ranks(case), port, directory)
            for rank in range(num_ranks(case))
        ]
        self.begin, self.running = time.monotonic(), set(self.pids)
        self.engine_failed = False
        self.kills: list[Kill] = []

    @property
    def seconds(self) -> float:
        """Time since they were started."""
        return time.monotonic() - self.begin

    def wait_until(self, seconds: float) -> bool:
        """Wait until a time after the start; returns False if all ranks ended before."""
        while self.running and self.seconds < seconds:
            assert self.seconds < DEADLINE_SECONDS, f"{self.directory} is still running"
            for pid in list(self.running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.running.remove(pid)
                    self._check(os.waitstatus_to_exitcode(status))
            time.sleep(0.005)
        return bool(self.running)

    def kill(self, kind: str, draw: random.Random) -> bool:
        """Kill processes of a kind; returns False if there are none."""
        who, rank = kind, draw.randrange(len(self.pids))
        if kind == "all":
            victims = list(self.running)
        elif kind == "rank":
            who, victims = f"rank {rank}", list(self.running & {self.pids[rank]})
        else:
            module = {"grader": "megatron_prepo.rewards.worker", "engine": "sglang.launch_server"}
            of_kind = [p for p in _descendants(self.pids[0]) if module[kind] in _command(p)]
            victims = [draw.choice(of_kind)] if of_kind else []
        if not victims:
            return False
        try:
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has just exited (a rank exists until it is waited for)
            return False
        step = prove.num_lines(self.directory / "metrics.jsonl")
        self.kills.append(Kill(self.case, who, round(self.seconds, 3), step))
        return True

    def end(self) -> None:
        """Kill all remaining processes."""
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.running.clear()

    def _check(self, code: int) -> None:
        if code == ENGINE_FAILED and any(kill.victim == "engine" for kill in self.kills):
            self.engine_failed = True
        elif code != 0:
            log = Path(f"{self.directory}.log").read_text()
            raise AssertionError(f"a rank of {self.directory} failed ({code}):\n{log[-3000:]}")


def config_of(case: str, directory: Path) -> configuration.Config:
    """Return the configuration of a case's run in a directory."""
    overrides = [*SHORT, *CASES[case], f"run.dir={directory}"]
    return configuration.load(LAPTOP / "prepo.yaml", overrides)


def num_ranks(case: str) -> int:
    """Return the number of ranks of a case's run."""
    return config_of(case, Path("none")).parallel.num_ranks


def undisturbed_run(case: str, directory: Path) -> float:
    """Run to the end and return the seconds that it took."""
    ranks = Ranks(case, directory)
    try:
        ranks.wait_until(DEADLINE_SECONDS)
        return ranks.seconds
    finally:
        ranks.end()


def disturbed_ranks(
    case: str, directory: Path, seconds: float, victims: Victims, most: int
) -> tuple[bool, list[Kill]]:
    """Start the ranks of a run and kill; returns whether the run finished, and the kills.

    Only one of its servers is killed: if the second were lost before the first has rejoined, the
    overlapped loop would use rollouts of other weights.
    """
    draw, ranks = victims.draw, Ranks(case, directory)
    try:
        moment = draw.uniform(0.0, 1.2 * seconds)
        while ranks.wait_until(moment if len(ranks.kills) < most else DEADLINE_SECONDS):
            kind = victims.next(case)
            if kind == "engine" and any(kill.victim == "engine" for kill in ranks.kills):
                return not ranks.wait_until(
                    DEADLINE_SECONDS
                ) and not ranks.engine_failed, ranks.kills
            if not ranks.kill(kind, draw):
                moment = ranks.seconds + 0.02  # as soon as a process of this kind exists
                continue
            victims.left.remove(kind)
            if kind in ("all", "rank"):
                return False, ranks.kills
            moment = ranks.seconds + draw.uniform(0.1, 0.6) * seconds
        return not ranks.engine_failed, ranks.kills
    finally:
        ranks.end()


def killed_until_done(
    case: str, directory: Path, undisturbed: Path, seconds: float, victims: Victims
) -> Trial:
    """Run one trial; `seconds` is the duration of the uninterrupted run."""
    kills, done = [], False
    while not done:
        done, new = disturbed_ranks(case, directory, seconds, victims, MOST_KILLS - len(kills))
        kills += new
        done = done or (directory / "summary.json").exists()  # killed after it was finished
    checks = prove.compare(undisturbed, directory)
    return Trial(case, kills, [f"{c.what}: {c.detail}" for c in checks if not c.equal])


def trials(cases: Sequence[str], num_kills: int, directory: Path, seed: int) -> Iterator[Trial]:
    """Run trials of the cases in turn, until there are enough kills, and some of each kind."""
    victims, number, undisturbed = Victims(random.Random(seed)), 0, {}
    kinds = Counter()
    while kinds.total() < num_kills or len(kinds) < len(KINDS):
        case = cases[number % len(cases)]
        if case not in undisturbed:
            whole = directory / f"undisturbed_{len(undisturbed)}"
            undisturbed[case] = whole, undisturbed_run(case, whole)
        run = directory / f"killed_{number}"
        trial = killed_until_done(case, run, *undisturbed[case], victims)
        if not trial.differs:
            shutil.rmtree(run)
        kinds.update(kind_of(kill) for kill in trial.kills)
        number += 1
        yield trial


def kind_of(kill: Kill) -> str:
    """Kind of the victim, one of `KINDS`."""
    return kill.victim.partition(" ")[0]


def main() -> int:
    """Run the trials; returns exit code 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=ownership.new_file(), help="JSON file, rewritten per run")
    parser.add_argument("--case", action="append", choices=CASES, help="only these settings")
    options = parser.parse_args()
    kills, differ, num_runs = [], [], 0
    with tempfile.TemporaryDirectory() as directory:
        os.environ |= _fake_servers(Path(directory, "package"))
        for trial in trials(
            options.case or list(CASES), options.kills, Path(directory), options.seed
        ):
            num_runs += 1
            kills += trial.kills
            differ += [dataclasses.asdict(trial)] if trial.differs else []
            of_kind = Counter(kind_of(kill) for kill in kills)
            killed = ", ".join(kill.victim for kill in trial.kills) or "nothing"
            print(
                f"{trial.case}: killed {killed}; differs: {trial.differs or 'nothing'}", flush=True
            )
            if options.out:
                result = {
                    "command": shlex.join(["python", *sys.argv]),
                    "machine": machine.describe(),
                    "kills": len(kills),
                    "kills_of": {kind: of_kind[kind] for kind in KINDS},
                    "runs": num_runs,
                    "runs_that_differ": differ,
                    "each": [dataclasses.asdict(kill) for kill in kills],
                }
                write_text(options.out, json.dumps(result, indent=1) + "\n")
    print(f"{len(kills)} kills of {num_runs} runs; {len(differ)} differ from an uninterrupted run")
    return 1 if differ else 0


def _fake_servers(package: Path) -> dict[str, str]:
    """Return an environment in which `python -m sglang.launch_server` is the fake server."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    import fake_sglang_package

    seconds = {"FAKE_SECONDS": str(SECONDS_OF_A_COMPLETION)}
    return fake_sglang_package.environment(package) | seconds


def _servers(case: str) -> bool:
    return "rollout.engine=sglang" in CASES[case]


def _descendants(pid: int) -> list[int]:
    """Return the existing descendants of a process."""
    try:
        tasks = [task / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
        children = [int(word) for task in tasks for word in task.read_text().split()]
    except FileNotFoundError:
        return []  # it has just exited
    return [found for child in children for found in (child, *_descendants(child))]


def _command(pid: int) -> str:
    """Return a process's command line; empty if it has exited."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


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
        (train_overlapped if config.train.overlap else train)(config)
        code = 0
    except (Stopped, EngineError) as error:
        print(error, file=sys.stderr)
        code = ENGINE_FAILED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
