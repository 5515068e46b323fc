"""Several methods on equal terms: the same configuration, seeds, prompts and rollout budget.

    megatron-prepo compare CONFIG --methods random,prepo,dapo --seeds 1-5 --dir runs/compare/NAME

Every run is a process of its own, in `DIR/ARM/SEED`, and leaves one record in `DIR/results.jsonl`
(`compare/record.py`).  What is finished is not run again, so the same command goes on after an
interruption.  `docs/compare.md` says what is equal and what the numbers mean.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import date
from pathlib import Path

from tqdm import tqdm

from megatron_prepo import config as configuration
from megatron_prepo.compare import record as run_record
from megatron_prepo.compare import slurm_array as array
from megatron_prepo.compare.planned_run import PlannedRun, refuse_other_settings
from megatron_prepo.config import Config
from megatron_prepo.errors import UserError
from megatron_prepo.files.atomic import write_text
from megatron_prepo.run import directory as run_directory

PREPO = ["selection.method=prepo", "weighting.method=relative_entropy"]
ENTROPY = ["selection.method=random", "weighting.method=relative_entropy"]

ARMS = {
    "random": ["selection.method=random", "weighting.method=none"],
    "prepo": PREPO,
    "ppl_only": ["selection.method=prepo", "weighting.method=none"],
    "entropy_only": ENTROPY,
    "reverse": [*PREPO, "selection.direction=high-to-low"],
    "rho_max": [*PREPO, "selection.rho_max=0.5"],
    "clamp": [*PREPO, "weighting.clamp=1.5"],
    "entropy_clamp": [*ENTROPY, "weighting.clamp=1.5"],
    "dapo": ["selection.method=dapo", "weighting.method=none"],
    "greso": ["selection.method=greso", "weighting.method=none"],
    "mopps": ["selection.method=mopps", "weighting.method=none"],
    "foresight": ["selection.method=foresight", "weighting.method=none"],
    "oracle": ["selection.method=oracle", "weighting.method=none"],
}
"""What can be compared, and the settings that make it."""

TRAIN = (sys.executable, "-m", "megatron_prepo", "train")
GRACE_SECONDS = 10.0
LOG_LINES = 15


class RunsFailed(RuntimeError):
    """Some runs ended with an error; the message names them and shows how their logs end."""


def compare(
    config_path: str | Path,
    methods: str,
    seeds: str,
    directory: str | Path,
    *,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    results: str | Path | None = None,
    name: str | None = None,
    command: str = "",
    train: Sequence[str] = TRAIN,
    check: Callable[[Config], object] | None = None,
    slurm: array.Slurm | None = None,
) -> list[dict]:
    """Run what is not there yet, and return the records of this comparison's runs.

    `train` and `check` are how a run is started and what looks at its inputs before (`preflight`);
    with `slurm` each run is a job there.
    Raises UserError before anything is started, RunsFailed after all that can be run has been.
    """
    check = check or check_inputs
    directory = Path(directory)
    results = Path(results or directory / "results.jsonl")
    name = name or directory.name
    planned = plan(config_path, parse_arms(methods), parse_seeds(seeds), directory, overrides)
    records = read_results(results)
    for run in planned:
        known = records.get((name, run.arm, run.seed))
        if known:
            now = run_record.settings(run.config)
            refuse_other_settings(known["settings"], now, run.name, f"{results} holds")

    def keep(run: PlannedRun) -> dict:
        made = {"comparison": name, "arm": run.arm, "seed": run.seed, "command": command}
        made |= {"overrides": run.overrides, **run_record.record(run.directory)}
        records[name, run.arm, run.seed] = made
        write_results(results, records)
        return made

    waiting = []
    for run in planned:
        if (name, run.arm, run.seed) in records:
            continue
        if run.is_finished():
            keep(run)
        else:
            waiting.append(run)
    say(equal_terms(planned, config_path, len(waiting)))
    for config in distinct_inputs([run.config for run in waiting]):
        check(config)
    for run in waiting:
        run_directory.check(run.replacing())
    failed = []
    bar = tqdm(total=len(planned), initial=len(planned) - len(waiting), desc="runs", unit="run")
    runs = (
        array.run_all(waiting, config_path, directory, slurm, jobs)
        if slurm
        else run_all(waiting, config_path, train, jobs)
    )
    with bar, closing(runs) as ended:
        for run, exit_code in ended:
            if exit_code == 0:
                bar.set_postfix_str(one_line(keep(run)))
                bar.update()
            else:
                failed.append((run, exit_code))
                bar.set_postfix_str(f"{run.name} failed")
    if failed:
        raise RunsFailed(failures(failed, len(planned)))
    return [records[name, run.arm, run.seed] for run in planned]


def check_inputs(config: Config) -> None:
    """`preflight.check`, and UserError if arms that start on other days had other prompts."""
    from megatron_prepo.inputs import preflight

    tokenizer = preflight.check(config).tokenizer
    pinned = not config.data.chat_template or config.data.chat_template_date is not None
    if not pinned and "strftime_now" in str(tokenizer.chat_template):
        raise UserError(
            f"the chat template of {config.model.hf} writes the date into prompts, which must be "
            "the same for all arms; set data.chat_template_date, such as "
            f"data.chat_template_date={date.today().isoformat()}"
        )


def parse_arms(methods: str) -> dict[str, list[str]]:
    """The arms named, and their overrides.

    >>> parse_arms("random, mine:selection.method=prepo;weighting.clamp=2")["mine"]
    ['selection.method=prepo', 'weighting.clamp=2']
    """
    arms = {}
    for part in filter(None, (part.strip() for part in methods.split(","))):
        name, colon, inline = part.partition(":")
        if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]", name):
            raise UserError(f"the arm {name!r} must be named by letters, digits, _, - and dots")
        if name in arms:
            raise UserError(f"the arm {name} is there twice")
        if colon and name in ARMS:
            raise UserError(f"the arm {name} is a known one; give yours another name")
        if not colon and name not in ARMS:
            raise UserError(
                f"unknown method {name}{configuration.nearest(name, list(ARMS))}; known: "
                f"{', '.join(ARMS)}; or define one: '{name}:selection.method=prepo;...'"
            )
        arms[name] = [o.strip() for o in inline.split(";") if o.strip()] if colon else ARMS[name]
    if not arms:
        raise UserError("--methods names none, such as random,prepo")
    return arms


def parse_seeds(seeds: str) -> list[int]:
    """The seeds, each once.

    >>> parse_seeds("1-3,7")
    [1, 2, 3, 7]
    """
    found = []
    for part in seeds.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise UserError(f"--seeds {seeds!r} must be like 1,2,3 or 1-5")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"--seeds {seeds!r}: {first}-{last} runs backwards")
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def plan(
    config_path: str | Path,
    arms: dict[str, list[str]],
    seeds: Sequence[int],
    directory: Path,
    overrides: Sequence[str],
) -> list[PlannedRun]:
    """All runs, seeds outermost: an interruption leaves whole seeds behind.

    What an arm sets wins over the command line's overrides, which hold for all arms.
    """
    runs = []
    for seed in seeds:
        for arm, of_arm in arms.items():
            run_dir = directory / arm / str(seed)
            where = f"run.dir={configuration.literal(run_dir)}"
            all_of_it = [*overrides, *of_arm, f"train.seed={seed}"]
            config = configuration.load(config_path, [*all_of_it, where])
            all_of_it.append(f"train.rollout_budget={rollout_budget(config)}")
            config = configuration.load(config_path, [*all_of_it, where])
            runs.append(PlannedRun(arm, seed, run_dir, all_of_it, config))
    return runs


def distinct_inputs(configs: Sequence[Config]) -> list[Config]:
    """One configuration for each set of inputs: arms and seeds mostly read the same."""
    by_inputs = {
        (
            *(c.model, c.data, c.parallel, c.rollout, c.eval),
            (c.selection, c.train) if c.selection.is_custom else c.selection.num_candidates,
        ): c
        for c in configs
    }
    return list(by_inputs.values())


def rollout_budget(config: Config) -> int:
    """Rollouts of a run: as set, or those of all steps at K groups of G each.

    The oracle's probes are no part of a method's cost, and a run counts them: it gets them on top.
    """
    selection, group_size = config.selection, config.rollout.samples_per_prompt
    budget = config.train.rollout_budget
    if budget is None:
        budget = config.train.total_steps * selection.num_selected * group_size
    if _is_oracle(config):
        paid = selection.num_selected
        budget = -(-budget * (selection.num_candidates + paid) // paid)
    return budget


def _is_oracle(config: Config) -> bool:
    """Return whether the method rolls out all candidates before it chooses."""
    if not config.selection.is_custom:
        return config.selection.method == "oracle"
    from megatron_prepo.selection import user_class

    return user_class.load(config.selection.method).needs_pass_rates


def equal_terms(planned: Sequence[PlannedRun], config_path: str | Path, num_waiting: int) -> str:
    """What is the same for all arms, in words."""
    arms, seeds = ([*dict.fromkeys(getattr(r, key) for r in planned)] for key in ("arm", "seed"))
    paid = [r for r in planned if not _is_oracle(r.config)] or planned
    config = paid[0].config
    each = config.selection.num_selected * config.rollout.samples_per_prompt
    return (
        f"{len(arms)} arms ({', '.join(arms)}) x seeds {', '.join(map(str, seeds))}: "
        f"{len(planned)} runs, {len(planned) - num_waiting} of them done\n"
        f"equal for all arms: {config_path}, per seed the order of candidate prompts, the held-out "
        f"prompts and their random numbers, and {config.train.rollout_budget:,} rollouts "
        f"(a step needs {each:,}; a method that refills pays more a step and takes fewer steps)"
    )


def read_results(path: Path) -> dict[tuple[str, str, int], dict]:
    """The records of a results file by (comparison, arm, seed); empty if there is none."""
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"--results {path} is no file; name one")
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line.strip()]
        return {(r["comparison"], r["arm"], r["seed"]): r for r in records}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no results file of `compare`: {error!r}") from None


def write_results(path: Path, records: dict[tuple[str, str, int], dict]) -> None:
    """All records, a line each: comparisons as they came, arms in the order of ARMS, then seeds."""
    comparisons = list(dict.fromkeys(comparison for comparison, _, _ in records))
    order = {arm: number for number, arm in enumerate(ARMS)}

    def place(key: tuple[str, str, int]) -> tuple:
        comparison, arm, seed = key
        return comparisons.index(comparison), order.get(arm, len(order)), arm, seed

    lines = [json.dumps(records[key], separators=(",", ":")) for key in sorted(records, key=place)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


def run_all(
    waiting: Sequence[PlannedRun], config_path: str | Path, train: Sequence[str], jobs: int | None
) -> Iterator[tuple[PlannedRun, int]]:
    """Run them, some at once; gives each and its exit code as it ends.

    However the iteration is left, no process stays behind.
    """
    if not waiting:
        return
    num_ranks = waiting[0].config.parallel.num_ranks
    devices = visible_devices()
    jobs = jobs or max(1, (len(devices) or os.cpu_count() or 1) // num_ranks)
    queue, running = list(waiting), {}
    with terminated_like_interrupted():
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
                    end([process])  # what a run that died may have left in its group
                    yield run, process.returncode
                if not ended:
                    time.sleep(0.1)
        finally:
            end([process for _, process in running.values()])


def start(
    run: PlannedRun, config_path: str | Path, train: Sequence[str], devices: list[str], slot: int
) -> subprocess.Popen:
    """The run as a process group of its own, with its share of the devices."""
    run.directory.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    if devices:
        num_ranks = run.config.parallel.num_ranks
        mine = [devices[(slot * num_ranks + i) % len(devices)] for i in range(num_ranks)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))
    where = [f"run.dir={configuration.literal(run.directory)}", "run.overwrite=true"]
    with open(run.directory / "train.log", "a") as log:
        return subprocess.Popen(
            [*train, str(config_path), *run.overrides, *where],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def visible_devices() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Ask all in the processes' groups to stop, then kill what is left: a second Ctrl-C at once."""
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


def signal_group(process: subprocess.Popen, number: int) -> None:
    """To the process and all that it started; those that are gone need none."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM end the comparison as Ctrl-C does, so that its runs are ended, too."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def one_line(record: dict) -> str:
    """A finished run on the progress bar."""
    summary = record["summary"]
    return (
        f"{record['arm']}/{record['seed']} {summary['pass_rate_before']:.3f} -> "
        f"{summary['pass_rate_after']:.3f}"
    )


def failures(failed: Sequence[tuple[PlannedRun, int]], total: int) -> str:
    """Which runs failed, and how their logs end."""
    parts = [f"{len(failed)} of {total} runs failed; the same command goes on with what is missing"]
    for run, exit_code in failed:
        log = run.directory / "train.log"
        text = log.read_text(errors="replace") if log.is_file() else "nothing: it did not start"
        lines = text.splitlines()[-LOG_LINES:]
        tail = "\n".join(f"    {line}" for line in lines)
        parts.append(f"{run.name}: exit code {exit_code}, {log}\n{tail}")
    return "\n".join(parts)


def say(text: str) -> None:
    """A line on the terminal."""
    print(text, file=sys.stderr)


def command_line(arguments: Sequence[str]) -> str:
    """The command as it can be typed again."""
    return shlex.join(["megatron-prepo", *arguments])
