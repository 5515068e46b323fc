"""The section of one run on a report's page: its result and figures, while it runs or afterwards.

The figures have every step as logged; the record of a run, which comparisons use, only means.
"""

import html
import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_prepo.compare import record as run_record
from megatron_prepo.compare import texts_section
from megatron_prepo.compare.analysis import Arm
from megatron_prepo.compare.page_parts import figure_html, foot
from megatron_prepo.compare.record import Record
from megatron_prepo.compare.run_figures import run_figures
from megatron_prepo.compare.texts_section import KeptTexts
from megatron_prepo.files import lock
from megatron_prepo.files.atomic import read_lines
from megatron_prepo.run.metrics_table import read_steps


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


def section(name: str, run: OneRun) -> str:
    """Return title, state, result, figures and command of a run, as HTML."""
    record, arm = run.record, run.record["arm"]
    summary = record["summary"]
    method = f"{summary['method']}, weights {summary['weighting']}, seed {record['seed']}"
    pictures = "\n".join(
        figure_html(figure, [arm])
        for figure in run_figures(Arm(arm, (record,)), run.steps, run.evaluations)
    )
    texts = "".join(f"{texts_section.section(kept)}\n" for kept in run.texts)
    return (
        f"<h1>{html.escape(name)}</h1>\n<p>{html.escape(method)}. {_state(name, run)}</p>\n"
        f'{_result(summary)}\n<div class="figures">\n{pictures}\n</div>\n{texts}{foot([record])}'
    )


def _state(name: str, run: OneRun) -> str:
    """Return whether the run is finished, in progress, or stopped."""
    summary = run.record["summary"]
    if "of_steps" not in summary:
        return "Finished."
    done = f"step {summary['steps']:,} of {summary['of_steps']:,}"
    if run.is_live:
        return f"<strong>In progress</strong>, {done}, {datetime.now():%Y-%m-%d %H:%M:%S}."
    command = html.escape(shlex.join(["megatron-prepo", "resume", name]))
    return f"<strong>Stopped</strong> after {done}; to resume it: <code>{command}</code>"


def _result(summary: dict[str, Any]) -> str:
    """Return the result so far: names and numbers."""
    unfinished = "of_steps" in summary

    def rate(key: str) -> str:
        if summary[key] is None:
            return "unknown: eval.temperature was changed during the run"
        if f"{key}_ci95" not in summary:
            return f"{summary[key]:.3f}"
        low, high = summary[f"{key}_ci95"]
        return f"{summary[key]:.3f}<small>{low:.3f} to {high:.3f}</small>"

    rows = {
        "pass rate before": rate("pass_rate_before"),
        "pass rate so far" if unfinished else "pass rate after": rate("pass_rate_after"),
        "gain so far" if unfinished else "gain, prompt by prompt": rate("gain"),
        "rollouts": f"{summary['rollouts']:,}",
        "tokens": f"{summary['tokens']:,}",
        "steps": f"{summary['steps']:,}"
        + (f" of {summary['of_steps']:,}, unfinished" if unfinished else ""),
    }
    lines = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in rows.items())
    # a run in progress has no summary that counts them
    prompts = f"{summary['held_out_prompts']} " if "held_out_prompts" in summary else ""
    words = f"avg@{summary['samples_per_prompt']} on {prompts}held-out prompts"
    return (
        f"<dl>{lines}</dl>\n"
        f"<p class=note>Pass rates are {words}. Small: 95 % intervals over prompts.</p>"
    )
