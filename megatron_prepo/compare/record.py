"""A run as one line of JSON: what a comparison and a report need of its directory.

Small enough to be committed (a run of 80 steps is about 8 KB, its directory megabytes), and without
a path of the machine it ran on: files are named by what is in them.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from megatron_prepo import config as configuration
from megatron_prepo.config import Config
from megatron_prepo.errors import UserError
from megatron_prepo.files.atomic import read_lines
from megatron_prepo.run import directory as run_directory
from megatron_prepo.run import ledger

SERIES = (
    "reward/mean",
    "reward/zero_variance_ratio",
    "selection/window_first",
    "ppl/candidates_q50",
    "ppl/selected_mean",
    "ppl/spearman_with_reward",
    "candidates/spearman_ppl",
    "candidates/spearman_length",
    "entropy/mean",
    "weight/std",
    "weight/max",
    "rollout/length",
    "loss/grad_norm",
)
"""Metrics of a step that are kept, where a run has them."""

TOTALS = ("rollout/paid", "rollout/tokens_paid")
"""Kept too; they count up."""

MAX_POINTS = 40
"""A longer series is kept as means over consecutive steps."""

NOT_COMPARED = ("run", "servers.python", "weight_sync.directory")
"""Section and settings of the configuration that say where something is, not what a run does."""

FILES = ("data.train", "data.eval", "model.hf", "model.megatron")
"""Settings that are paths, and count by the content found there."""


def is_finished(directory: Path) -> bool:
    """Whether the run in this directory came to its end: the summary is written last."""
    return all((directory / name).is_file() for name in ("config.yaml", "summary.json"))


def is_there(directory: Path) -> bool:
    """Whether there is a run in this directory, finished or not."""
    names = ("config.yaml", "metrics.jsonl", "evaluations.jsonl", "ledger.jsonl")
    return all((directory / name).is_file() for name in names)


def config_of(directory: Path) -> Config:
    """The configuration of the run in this directory, with today's defaults for newer settings."""
    return configuration.load(directory / "config.yaml")


def settings(config: Config) -> dict[str, object]:
    """What the run does: the settings that are not defaults, files by their hash.

    Defaults are left out so that a setting which the program learns later does not make all earlier
    records look different.
    """
    changed = {}
    for section in dataclasses.fields(Config):
        value = getattr(config, section.name)
        if section.name in NOT_COMPARED:
            continue
        if isinstance(value, dict):
            changed |= {f"{section.name}.{key}": value[key] for key in sorted(value)}
            continue
        for field in dataclasses.fields(value):
            key = f"{section.name}.{field.name}"
            if getattr(value, field.name) != field.default and key not in NOT_COMPARED:
                changed[key] = getattr(value, field.name)
    for key in run_directory.USER_CODE:
        file, colon, name = str(changed.get(key, "")).rpartition(":")
        if colon:
            changed[key] = f"{_content(file)}:{name}"
    return {key: _content(v) if key in FILES else v for key, v in changed.items()}


def config_hash(of: dict[str, object]) -> str:
    """A name for `settings`."""
    text = json.dumps(of, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(before: dict[str, object], now: dict[str, object]) -> list[str]:
    """`key: before -> now` for each setting that differs; `(default)` where one has none."""
    return [
        f"{key}: {before.get(key, '(default)')} -> {now.get(key, '(default)')}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def record(directory: str | Path) -> dict:
    """The record of a run, finished or as far as it has come.

    Raises UserError if it has not been evaluated yet.
    """
    directory = Path(directory)
    config = config_of(directory)
    steps = list(read_lines(directory / "metrics.jsonl"))
    evaluations = list(read_lines(directory / "evaluations.jsonl"))
    if not evaluations:
        raise UserError(f"the run in {directory} has not been evaluated yet")
    summary = _summary_so_far(config, steps, evaluations)
    if is_finished(directory):
        summary = json.loads((directory / "summary.json").read_text())
    entries = list(ledger.read(directory / "ledger.jsonl"))
    seconds, machine = summary.pop("seconds"), summary.pop("machine")
    of_settings = settings(config)
    return _rounded(
        {
            "config_hash": config_hash(of_settings),
            "settings": of_settings,
            "machine": machine,
            "summary": summary,
            "evaluations": _evaluations(evaluations, entries, steps),
            "probes": sum(entry.purpose == "probe" for entry in entries),
            "steps": _series(steps),
            "ppl_deciles": _pass_rate_by_decile(entries, config.reward.high),
            "candidates_ppl_deciles": _mean_of_candidates_deciles(steps),
            "seconds": seconds,
        }
    )


def _summary_so_far(config: Config, steps: Sequence[dict], evaluations: Sequence[dict]) -> dict:
    """What `Run.finish` would say, of a run that has not come to its end; `of_steps` marks it.

    The gain has no interval, since results of single prompts are not kept.
    """
    first, last = evaluations[0], evaluations[-1]
    # `eval` may have changed when the run was resumed; older versions did not note these
    comparable = all(first.get(key) == last.get(key) for key in ("prompts", "temperature"))
    totals = steps[-1] if steps else {name: 0 for name in TOTALS}
    stages = {name for step in steps for name in step if name.startswith("seconds/")}
    return {
        "method": config.selection.name,
        "weighting": config.weighting.method,
        "steps": len(steps),
        "of_steps": config.train.total_steps,
        "pass_rate_before": first["pass_rate"],
        "pass_rate_before_ci95": first["pass_rate_ci95"],
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
    evaluations: Sequence[dict], entries: Sequence[ledger.LedgerEntry], steps: Sequence[dict]
) -> list[dict]:
    """Pass rate and what had been paid by then; of that, what went to probes, if there are any."""
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


def _series(steps: Sequence[dict]) -> dict[str, object]:
    """Columns of at most MAX_POINTS values, each of `step/every` steps."""
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
    """Pass rate of the prompts paid for to train, by decile of perplexity within their step."""
    groups: dict[int, dict[str, list]] = {}
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


def _mean_of_candidates_deciles(steps: Sequence[dict]) -> list[float] | None:
    """The same of all candidates, over the run: known where every candidate is rolled out."""
    name = "candidates/pass_rate_ppl_decile_"
    rows = [[s.get(f"{name}{i}") for i in range(10)] for s in steps if f"{name}0" in s]
    whole = [row for row in rows if None not in row]
    return [sum(column) / len(whole) for column in zip(*whole, strict=True)] if whole else None


def _rounded(value: object) -> object:
    """Fractions to 4 significant digits; whole numbers as they are."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        # a setting is compared again later, so it stays exact
        return {k: v if k == "settings" else _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _content(path: str | None) -> str | None:
    return path and _hash_of(Path(path).resolve())


@lru_cache
def _hash_of(path: Path) -> str:
    """A file's hash, or a directory's: of its files' names and contents."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path)}\n{_hash_of(file)}\n".encode())
    elif path.is_file():
        with open(path, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    else:
        return "absent"  # a report of an old run does not need what it was trained on
    return f"sha256:{digest.hexdigest()[:16]}"
