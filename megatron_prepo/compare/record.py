"""A run as one line of JSON, with what a comparison and a report need from its directory.

It is small enough to commit (about 8 KB for a run of 80 steps, whose directory has megabytes) and
has no paths of the machine it ran on: files are identified by hashes of their content.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_prepo import config as configuration
from megatron_prepo.config import Config, EvalConfig, former
from megatron_prepo.errors import UserError
from megatron_prepo.files import rows
from megatron_prepo.files.atomic import read_lines
from megatron_prepo.inputs import hub
from megatron_prepo.run import ledger, metrics_table
from megatron_prepo.run.changes import USER_CODE

Record = dict[str, Any]
Settings = dict[str, Any]
"""The settings of a run that are not defaults, by `section.name`."""

SERIES = (
    "reward/mean",
    "reward/zero_variance_ratio",
    "selection/window_first",
    "ppl/candidates/q50",
    "ppl/selected/mean",
    "ppl/spearman_with_reward",
    "candidates/spearman_ppl",
    "candidates/spearman_length",
    "entropy/mean",
    "weight/std",
    "weight/max",
    "rollout/length",
    "loss/grad_norm",
)
"""Metrics per step that a record keeps if the run has them."""

TOTALS = ("rollout/paid", "rollout/tokens_paid")
"""Cumulative metrics, which a record keeps too."""

MAX_POINTS = 40
"""A longer series is reduced to means over consecutive steps."""

DEFAULTS = {
    f"{section.name}.{field.name}": field.default
    for section in dataclasses.fields(Config)
    if dataclasses.is_dataclass(section.type)
    for field in dataclasses.fields(section.type)
}
"""Default of each setting, MISSING if it is required."""

NOT_COMPARED = (
    "run",
    "texts",
    "servers.count",
    "servers.python",
    "weight_sync.directory",
    "checkpoint.every",
    "checkpoint.every_minutes",
    "checkpoint.keep_last",
    "checkpoint.keep_best",
    "checkpoint.best_is",
)
"""Sections and settings that do not affect what a run computes: places, the number of servers,
and what and when it saves."""

FILES = ("data.train", "data.eval", "data.few_shot", "model.hf", "model.megatron")
"""Settings that are paths; they are compared by the content found there."""


def is_finished(directory: Path) -> bool:
    """Return whether the run in this directory is complete: its summary is written last."""
    return all((directory / name).is_file() for name in ("config.yaml", "summary.json"))


def holds_run(directory: Path) -> bool:
    """Return whether this directory holds a run, finished or not."""
    names = ("config.yaml", "metrics.jsonl", "ledger.jsonl")
    return all((directory / name).is_file() for name in names)


def read_config(directory: Path) -> Config:
    """Return a run's configuration, with the current defaults for settings it predates."""
    return configuration.load(directory / "config.yaml")


def settings(config: Config) -> Settings:
    """Return what the run does: the settings that are not defaults, files by their hash.

    Defaults are omitted so that a setting added in a later version does not make all earlier
    records differ.
    """
    changed: Settings = {}
    for section in dataclasses.fields(Config):
        value = getattr(config, section.name)
        if section.name in NOT_COMPARED:
            continue
        if isinstance(value, dict):
            changed |= {f"{section.name}.{key}": value[key] for key in sorted(value)}
            continue
        for field in dataclasses.fields(value):
            key, setting = f"{section.name}.{field.name}", getattr(value, field.name)
            if setting != field.default and key not in NOT_COMPARED:
                # as a record has it after reading, which has no tuples
                changed[key] = list(setting) if isinstance(setting, tuple) else setting
    for key in USER_CODE:
        file, colon, name = str(changed.get(key, "")).rpartition(":")
        if colon:
            changed[key] = f"{_content(file)}:{name}"
    return {
        key: configuration.with_paths(value, _content) if key in FILES else value
        for key, value in changed.items()
    }


def config_hash(of: Settings) -> str:
    """Return a short hash that identifies `settings`."""
    text = json.dumps(of, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(before: Settings, now: Settings) -> list[str]:
    """Return `key: before -> now` for each setting that differs; `(default)` if absent.

    `before` may be of an earlier version; UserError if it cannot be compared with settings of now.
    """
    before = {
        key: value
        for key, value in former.replaced(before).items()
        if value != DEFAULTS.get(key, MISSING) and not {key, key.split(".")[0]} & {*NOT_COMPARED}
    }
    return [
        f"{key}: {before.get(key, '(default)')} -> {now.get(key, '(default)')}"
        for key in sorted({*before, *now} - {*former.MEMORY})
        if before.get(key) != now.get(key)
    ]


def record(directory: str | Path) -> Record:
    """Return the record of a run, finished or in progress.

    Raises UserError if it has not been evaluated yet.
    """
    directory = Path(directory)
    config = read_config(directory)
    steps = list(metrics_table.read_steps(directory))
    path = directory / "evaluations.jsonl"
    evaluations = list(read_lines(path)) if path.is_file() else []
    if not evaluations:
        raise UserError(
            f"the run in {directory} has not been evaluated yet, which a report needs: its first "
            f"evaluation is {_first_evaluation(config.eval, config.train.total_steps)}"
        )
    summary = _summary_so_far(config, steps, evaluations)
    if is_finished(directory):
        summary = json.loads((directory / "summary.json").read_text())
    entries = list(ledger.read(directory / "ledger.jsonl"))
    seconds, machine = summary.pop("seconds"), summary.pop("machine")
    of_settings = settings(config)
    made: Record = _rounded(
        {
            "config_hash": config_hash(of_settings),
            "settings": of_settings,
            "machine": machine,
            "summary": summary,
            "evaluations": _evaluations(evaluations, entries, steps),
            "probes": sum(entry.purpose == "probe" for entry in entries),
            "steps": _series(steps),
            "ppl_deciles": _pass_rate_by_decile(entries, config.reward.high),
            "candidates_ppl_deciles": _mean_candidate_deciles(steps),
            "seconds": seconds,
        }
    )
    return made


def _first_evaluation(settings: EvalConfig, total_steps: int) -> str:
    """Return when a run is evaluated first, in words."""
    if settings.before:
        return "before its first step"
    steps = settings.every if 0 < settings.every < total_steps else total_steps
    of = f"eval.before=false, eval.every={settings.every}"
    return f"after {steps} of {total_steps} steps ({of})"


SAMPLED = ("prompts", "temperature", "top_p", "top_k")
"""Values of an evaluation that must agree for two pass rates to be comparable."""


def _summary_so_far(
    config: Config, steps: Sequence[Record], evaluations: Sequence[Record]
) -> Record:
    """Return the summary of a run in progress, in the form of `Run.finish`; `of_steps` marks it.

    The gain has no interval, since the results of individual prompts are not saved.
    """
    last = evaluations[-1]
    first = evaluations[0] if evaluations[0]["step"] == 0 else {}  # with eval.before=false
    # `eval` may have changed when the run was resumed; older versions did not record these
    comparable = all(first.get(key) == last.get(key) for key in SAMPLED) and bool(first)
    totals = steps[-1] if steps else {name: 0 for name in TOTALS}
    stages = {name for step in steps for name in step if name.startswith("seconds/")}
    return {
        "method": config.selection.name,
        "weighting": config.weighting.method,
        "steps": len(steps),
        "of_steps": config.train.total_steps,
        "pass_rate_before": first.get("pass_rate"),
        "pass_rate_before_ci95": first.get("pass_rate_ci95"),
        "pass_rate_after": last["pass_rate"],
        "pass_rate_after_ci95": last["pass_rate_ci95"],
        "gain": last["pass_rate"] - first["pass_rate"] if comparable else None,
        "samples_per_prompt": last["samples_per_prompt"],
        "rollouts": totals["rollout/paid"],
        "tokens": totals["rollout/tokens_paid"],
        "seconds": {
            name.removeprefix("seconds/"): sum(step.get(name, 0.0) for step in steps)
            for name in sorted(stages)
        },
        "machine": {},
    }


def _evaluations(
    evaluations: Sequence[Record], entries: Sequence[ledger.LedgerEntry], steps: Sequence[Record]
) -> list[Record]:
    """Return pass rates and the costs up to each evaluation, with the part that went to probes."""
    keys = ("step", "rollouts", "tokens", "seconds", "pass_rate", "samples_per_prompt")
    probes = [entry for entry in entries if entry.purpose == "probe"]
    kept = []
    for evaluation in evaluations:
        point = {key: evaluation[key] for key in keys}
        if probes:
            done = point["step"]
            earlier = [entry for entry in probes if entry.step < done]
            point["probes"] = len(earlier)
            point["probe_tokens"] = sum(entry.length for entry in earlier)
            point["probe_seconds"] = sum(s.get("seconds/probes", 0.0) for s in steps[:done])
        kept.append(point)
    return kept


def _series(steps: Sequence[Record]) -> dict[str, object]:
    """Return columns of at most MAX_POINTS values, each for `step/every` steps."""
    every = max(1, math.ceil(len(steps) / MAX_POINTS))
    chunks = [steps[first : first + every] for first in range(0, len(steps), every)]

    def column(name: str, of_chunk: Callable[[list[float]], float]) -> list[float | None]:
        known = [[s[name] for s in chunk if s.get(name) is not None] for chunk in chunks]
        return [of_chunk(values) if values else None for values in known]

    columns = {name: column(name, lambda values: sum(values) / len(values)) for name in SERIES}
    columns |= {name: column(name, lambda values: values[-1]) for name in TOTALS}
    present = {name: c for name, c in columns.items() if any(v is not None for v in c)}
    return {"step/every": every, **present}


def _pass_rate_by_decile(
    entries: Iterable[ledger.LedgerEntry], pass_reward: float
) -> list[float | None] | None:
    """Return the pass rate of the training prompts by decile of perplexity within their step."""
    groups: dict[int, dict[str, list[tuple[float, bool]]]] = {}
    for entry in entries:
        if entry.purpose == "train" and entry.ppl is not None:
            passed = entry.reward >= pass_reward
            groups.setdefault(entry.step, {}).setdefault(entry.prompt_id, []).append(
                (entry.ppl, passed)
            )
    deciles: list[list[float]] = [[] for _ in range(10)]
    for step in groups.values():
        for position, samples in enumerate(sorted(step.values(), key=lambda group: group[0][0])):
            rate = sum(passed for _, passed in samples) / len(samples)
            deciles[position * 10 // len(step)].append(rate)
    if not groups:
        return None
    return [sum(rates) / len(rates) if rates else None for rates in deciles]


def _mean_candidate_deciles(steps: Sequence[Record]) -> list[float] | None:
    """Return the mean of all candidates' deciles, if the run rolls out every candidate."""
    name = "candidates/pass_rate_ppl_decile_"
    rows = [[s.get(f"{name}{i}") for i in range(10)] for s in steps if f"{name}0" in s]
    full = [row for row in rows if None not in row]
    return [sum(column) / len(full) for column in zip(*full, strict=True)] if full else None


def _rounded(value: Any) -> Any:
    """Round floats to 4 significant digits, None if not finite; keep integers and settings."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        # settings are compared with those of later runs, so they stay exact
        return {k: v if k == "settings" else _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _content(path: str | None) -> str | None:
    if not path or path.startswith(hub.PREFIX):  # its commit names the content
        return path
    if os.path.exists(path) or not rows.exists(path):
        return _content_hash(Path(path).resolve())
    of_files = "".join(map(_content_hash, map(Path.resolve, rows.data_files(path))))
    return f"sha256:{hashlib.sha256(of_files.encode()).hexdigest()[:16]}"


@lru_cache
def _content_hash(path: Path) -> str:
    """Return the hash of a file, or of the names and contents of a directory's files."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path)}\n{_content_hash(file)}\n".encode())
    elif path.is_file():
        with open(path, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    else:
        return "absent"  # a report does not need the files that a run was trained on
    return f"sha256:{digest.hexdigest()[:16]}"
