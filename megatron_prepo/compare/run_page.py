"""The section of one run on a report's page: its result and figures, while it runs or afterwards.

The figures have every step as logged; the record of a run, which comparisons use, only means.
"""

import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_prepo.compare import record as run_record
from megatron_prepo.compare import texts_section
from megatron_prepo.compare.analysis import Arm
from megatron_prepo.compare.page_parts import Cell, drawn, how_it_was_run
from megatron_prepo.compare.record import Record
from megatron_prepo.compare.run_figures import run_figures
from megatron_prepo.compare.texts_section import KeptTexts
from megatron_prepo.files import lock
from megatron_prepo.files.atomic import read_lines
from megatron_prepo.run.metrics_table import read_steps
from megatron_prepo.run.summary import why_unknown


@dataclass(frozen=True)
class OneRun:
    """A run as its directory has it at one moment."""

    record: Record
    """As in a comparison, with arm and seed."""
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    is_live: bool
    """Whether a process was training it."""
    texts: list[KeptTexts]
    """Its rollouts and evaluations, as far as they are kept."""


def is_live(directory: Path) -> bool:
    """Return whether a process trains the run in this directory, on any machine."""
    return not run_record.is_finished(directory) and lock.is_held_elsewhere(directory / lock.FILE)


def read_run(directory: Path) -> OneRun:
    """Read a run, finished or not.

    Raises UserError if it has not been evaluated yet.
    """
    live, config = is_live(directory), run_record.read_config(directory)
    again = ["megatron-prepo", "train", str(directory / "config.yaml"), "run.dir=NEW_DIRECTORY"]
    about = {"arm": config.selection.name, "seed": config.train.seed, "command": shlex.join(again)}
    return OneRun(
        about | run_record.record(directory),
        list(read_steps(directory)),
        list(read_lines(directory / "evaluations.jsonl")),
        live,
        texts_section.read_texts(directory),
    )


def section(name: str, run: OneRun) -> dict[str, Any]:
    """Return what the template shows of a run: state, result, figures, texts and command."""
    record, arm = run.record, run.record["arm"]
    summary = record["summary"]
    made = run_figures(Arm(arm, (record,)), run.steps, run.evaluations)
    # a run in progress has no summary that counts them
    prompts = f"{summary['held_out_prompts']} " if "held_out_prompts" in summary else ""
    return {
        "template": "run.html",
        "method": f"{summary['method']}, weights {summary['weighting']}, seed {record['seed']}",
        "done": _unfinished(summary),
        "is_live": run.is_live,
        "now": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "resume": shlex.join(["megatron-prepo", "resume", name]),
        "result": _result(summary),
        "measure": f"avg@{summary['samples_per_prompt']} on {prompts}held-out prompts",
        "pictures": drawn(made, [arm]),
        "texts": run.texts,
        "how": how_it_was_run([record]),
    }


def _unfinished(summary: dict[str, Any]) -> str:
    """Return how far a run is; empty for a finished one."""
    if "of_steps" not in summary:
        return ""
    return f"step {summary['steps']:,} of {summary['of_steps']:,}"


def _result(summary: dict[str, Any]) -> dict[str, Cell]:
    """Return the result so far: names and numbers."""
    unfinished = "of_steps" in summary
    steps = f"{summary['steps']:,}"
    return {
        "pass rate before": _rate(summary, "pass_rate_before"),
        "pass rate so far" if unfinished else "pass rate after": _rate(summary, "pass_rate_after"),
        "gain so far" if unfinished else "gain, prompt by prompt": _rate(summary, "gain"),
        "rollouts": Cell(f"{summary['rollouts']:,}"),
        "tokens": Cell(f"{summary['tokens']:,}"),
        "steps": Cell(f"{steps} of {summary['of_steps']:,}, unfinished" if unfinished else steps),
    }


def _rate(summary: dict[str, Any], key: str) -> Cell:
    if summary[key] is None:
        return Cell(why_unknown(summary))
    if f"{key}_ci95" not in summary:
        return Cell(f"{summary[key]:.3f}")
    low, high = summary[f"{key}_ci95"]
    return Cell(f"{summary[key]:.3f}", (f"{low:.3f} to {high:.3f}",))
