"""Compare methods on equal terms: the same configuration, seeds, prompts and rollout budget.

    megatron-prepo compare CONFIG --methods random,prepo,dapo --seeds 1-5 --dir runs/compare/NAME

Each run is a separate process or Slurm job in `DIR/ARM/SEED` and adds one record to
`DIR/results.jsonl` (`compare/record.py`).  Finished runs are not repeated, so the same command
resumes an interrupted comparison.  `docs/compare.md` defines what is equal for all arms and what
the numbers mean.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

from megatron_prepo import config as configuration
from megatron_prepo.compare import local_runs
from megatron_prepo.compare import record as run_record
from megatron_prepo.compare import slurm_array as array
from megatron_prepo.compare.arms import ARMS, parse_arms
from megatron_prepo.compare.planned_run import LOG, PlannedRun, refuse_other_settings
from megatron_prepo.compare.record import Record
from megatron_prepo.config import Config, SelectionConfig
from megatron_prepo.errors import UserError
from megatron_prepo.files.atomic import write_text
from megatron_prepo.inputs import hub
from megatron_prepo.process import activity, progress
from megatron_prepo.run.summary import change

TRAIN = (sys.executable, "-m", "megatron_prepo", "train")
"""The command that starts one run."""
LOG_LINES = 15
"""Lines of a failed run's log in the error message."""

Records = dict[tuple[str, str, int], Record]
"""Records by comparison, arm and seed."""


class RunsFailed(RuntimeError):
    """Some runs failed; the message names them and quotes the last lines of their logs."""


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
) -> list[Record]:
    """Run the missing runs, and return the records of all runs of this comparison.

    `train` is the command that starts a run, and `check` checks its inputs before any is started
    (default: `check_inputs`).  With `slurm`, each run is a job there.
    Raises UserError before anything is started, and RunsFailed after every run has been tried.
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

    def keep(run: PlannedRun) -> Record:
        made: Record = {"comparison": name, "arm": run.arm, "seed": run.seed, "command": command}
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
    with activity.doing("checking settings, model and prompts"):
        for config in distinct_inputs([run.config for run in waiting]):
            check(config)
    log(equal_terms(planned, config_path, len(waiting)))
    for run in waiting:
        run.check_directory()
    runs = (
        array.run_all(waiting, config_path, directory, slurm, jobs)
        if slurm
        else local_runs.run_all(waiting, config_path, train, jobs)
    )
    failed = _collect(runs, keep, total=len(planned), done=len(planned) - len(waiting))
    if failed:
        raise RunsFailed(failures(failed, len(planned)))
    return [records[name, run.arm, run.seed] for run in planned]


def _collect(
    runs: Generator[tuple[PlannedRun, int], None, None],
    keep: Callable[[PlannedRun], Record],
    *,
    total: int,
    done: int,
) -> list[tuple[PlannedRun, int]]:
    """Keep the record of each run that succeeds; return failed runs with exit codes."""
    failed = []
    bar = progress.bar(total=total, initial=done, desc="runs", unit="run")
    with bar, closing(runs) as ended:
        for run, exit_code in ended:
            if exit_code == 0:
                line = one_line(keep(run))
                bar.update()
                bar.set_postfix_str(line)
            else:
                failed.append((run, exit_code))
                bar.set_postfix_str(f"{run.name} failed")
    return failed


def check_inputs(config: Config) -> None:
    """Run `preflight.check`; raise UserError for what arms cannot be compared by.

    That is a missing evaluation before the first step, and prompts that depend on the day.
    """
    from megatron_prepo.inputs import preflight
    from megatron_prepo.run import directory as run_directory

    if not config.eval.before:
        raise UserError(
            "eval.before=false: arms are compared from the pass rate before training on; remove it"
        )
    needed = run_directory.needs_initial_weights(config)
    config = hub.resolved(config)
    tokenizer: Any = preflight.check(config, initial_weights=needed).tokenizer
    pinned = not config.data.chat_template or config.data.chat_template_date is not None
    if not pinned and "strftime_now" in str(tokenizer.chat_template):
        raise UserError(
            f"the chat template of {config.model.hf} writes the current date into prompts, which "
            "must be the same for all arms; set data.chat_template_date, such as "
            f"data.chat_template_date={date.today().isoformat()}"
        )


def parse_seeds(seeds: str) -> list[int]:
    """Return the seeds that `--seeds` names, each once.

    >>> parse_seeds("1-3,7")
    [1, 2, 3, 7]
    """
    found: list[int] = []
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
    """Return all runs, seeds outermost, so that an interruption leaves complete seeds.

    An arm's settings take precedence over the command line's overrides, which apply to all arms.
    Names on the hub are at the commits of a run that the directory holds, else at the newest.
    """
    begun = [file.parent for file in sorted(directory.glob("*/*/config.yaml"))] or [Path("-")]
    held = [f"run.dir={configuration.literal(begun[0])}", "run.overwrite=false"]
    overrides = [*overrides, *hub.pins(configuration.load(config_path, [*overrides, *held]))]
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
    """Return one configuration per set of inputs, since most arms and seeds share theirs."""
    by_inputs = {
        (
            *(c.model, c.data, c.parallel, c.rollout, c.eval, c.reward),
            (c.selection, c.train) if c.selection.is_custom else c.selection.num_candidates,
        ): c
        for c in configs
    }
    return list(by_inputs.values())


def rollout_budget(config: Config) -> int:
    """Return the rollouts of a run: as set, or those of all steps at K groups of G each.

    A run's budget includes the oracle's probes, which are not a cost of the method; the oracle's
    budget is raised by them.
    """
    selection, group_size = config.selection, config.rollout.samples_per_prompt
    budget = config.train.rollout_budget
    if budget is None:
        budget = config.train.total_steps * selection.num_selected * group_size
    if _is_oracle(config.selection):
        trained = selection.num_selected
        budget = -(-budget * (selection.num_candidates + trained) // trained)
    return budget


def _is_oracle(selection: SelectionConfig) -> bool:
    """Return whether the method rolls out all candidates before it chooses."""
    from megatron_prepo.selection import load  # and torch

    return load(selection.method).needs_pass_rates


def equal_terms(planned: Sequence[PlannedRun], config_path: str | Path, num_waiting: int) -> str:
    """Describe the runs and what is equal for all arms."""
    arms, seeds = ([*dict.fromkeys(getattr(r, key) for r in planned)] for key in ("arm", "seed"))
    without_probes = [r for r in planned if not _is_oracle(r.config.selection)] or planned
    config = without_probes[0].config
    each = config.selection.num_selected * config.rollout.samples_per_prompt
    return (
        f"{len(arms)} arms ({', '.join(arms)}) x seeds {', '.join(map(str, seeds))}: "
        f"{len(planned)} runs, {len(planned) - num_waiting} of them done\n"
        f"equal for all arms: {config_path}, per seed the order of candidate prompts, the held-out "
        f"prompts and their random numbers, and {config.train.rollout_budget:,} rollouts "
        f"({each:,} per step; a method that adds groups generates more in a step and takes fewer)"
    )


def read_results(path: Path) -> Records:
    """Return the records of a results file; none if it does not exist."""
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"--results {path} is no file; name one")
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line.strip()]
        keys = [(r["comparison"], r["arm"], r["seed"]) for r in records]
        by_key = dict(zip(keys, records, strict=True))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no results file of `compare`: {error!r}") from None
    if len(by_key) < len(keys):  # one of them would be lost when the file is written
        name, arm, seed = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{path} has the run {name} {arm}/{seed} twice; remove one of the lines")
    return by_key


def write_results(path: Path, records: Records) -> None:
    """Write a line per record: comparisons as first seen, then arms as in ARMS, then seeds."""
    comparisons = list(dict.fromkeys(comparison for comparison, _, _ in records))
    order = {arm: number for number, arm in enumerate(ARMS)}

    def place(key: tuple[str, str, int]) -> tuple[int, int, str, int]:
        comparison, arm, seed = key
        return comparisons.index(comparison), order.get(arm, len(order)), arm, seed

    lines = [json.dumps(records[key], separators=(",", ":")) for key in sorted(records, key=place)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


def one_line(record: Record) -> str:
    """Return arm, seed and pass rates of a finished run, for the terminal."""
    return f"{record['arm']}/{record['seed']} {change(record['summary'])}"


def failures(failed: Sequence[tuple[PlannedRun, int]], total: int) -> str:
    """Return a message with the failed runs and the last lines of their logs."""
    parts = [f"{len(failed)} of {total} runs failed; the same command runs only what is missing"]
    for run, exit_code in failed:
        log = run.directory / LOG
        text = log.read_text(errors="replace") if log.is_file() else "no log: it did not start"
        lines = text.splitlines()[-LOG_LINES:]
        tail = "\n".join(f"    {line}" for line in lines)
        parts.append(f"{run.name}: exit code {exit_code}, {log}\n{tail}")
    return "\n".join(parts)


def log(text: str) -> None:
    """Print a line to the terminal."""
    print(text, file=sys.stderr)


def command_line(arguments: Sequence[str]) -> str:
    """Return the command line, quoted for a shell."""
    return shlex.join(["megatron-prepo", *arguments])
