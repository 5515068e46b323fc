"""Runs and comparisons as one page: `megatron-prepo report RUN_OR_RESULTS... [--out report.html]`.

The page is self-contained and needs no network: figures are embedded; those of comparisons are also
written next to it as PNG for slides.  Its numbers come from `compare/analysis.py`, which
`docs/compare.md` defines, and from single runs (`run_page.py`).
"""

import html
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from megatron_prepo.compare import analysis as comparison
from megatron_prepo.compare import figures, run_page, texts_section
from megatron_prepo.compare import record as run_record
from megatron_prepo.compare.analysis import Arm, ArmResult, Estimate, Savings
from megatron_prepo.compare.page_parts import TEMPLATES, Cell, drawn, how_it_was_run
from megatron_prepo.compare.record import Record
from megatron_prepo.compare.run_page import OneRun
from megatron_prepo.compare.style import BOLD, CEILING, Palette
from megatron_prepo.errors import UserError
from megatron_prepo.files.atomic import write_text
from megatron_prepo.run.metrics_table import renamed

Sections: TypeAlias = dict[str, list[Record] | OneRun]
"""The runs of a comparison, or a single run, by the section's title."""

RELOAD_SECONDS = 20
"""Time after which the page of a run in progress reloads itself, and at least between writing it
twice."""
BUSY = 0.1
"""Largest share of the time that is spent on writing such a page."""

CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def follow(
    sources: Sequence[str | Path], out: str | Path, *, once: bool, log: Callable[[str], None]
) -> None:
    """Write the page; unless `once`, again and again until none of its runs is in progress.

    Ctrl-C leaves the page as it is, without its reloading.
    """
    followed = False
    try:
        while True:
            start = time.monotonic()
            live = not once and any(run_page.is_live(Path(source)) for source in sources)
            written = report(sources, out, reloads=live)
            if not live:
                break
            if not followed:
                log(f"{written[0]}, written every {RELOAD_SECONDS} s until the run ends (Ctrl-C)")
            followed = True
            time.sleep(max(RELOAD_SECONDS, (time.monotonic() - start) / BUSY))
    except KeyboardInterrupt:
        written = report(sources, out)
    more = f", with {len(written) - 1} pictures and tables in the same folder"
    log(f"{written[0]}{more * (len(written) > 1)}")


def report(sources: Sequence[str | Path], out: str | Path, *, reloads: bool = False) -> list[Path]:
    """Write the page, its pictures and headline tables; return all paths, the page first.

    `reloads`: the page reloads itself.
    """
    sections = read(sources)
    out = Path(out)
    files: dict[Path, Callable[[], None]] = {
        out: lambda: write_text(out, page(sections, reloads=reloads))
    }
    for name, records in sections.items():
        if isinstance(records, OneRun):
            continue
        arms = list(comparison.group_by_arm(records).values())
        names = [arm.name for arm in arms]
        for figure in figures.figures(arms):
            path = out.parent / f"{figures.slug(name)[1:]}_{figure.key}.png"
            files[path] = partial(figures.png, figure, names, path)
        path = out.parent / f"{figures.slug(name)[1:]}.md"
        files[path] = partial(_write_markdown, path, records)
    for path in files:
        _refuse_another_file(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    for write in files.values():
        write()
    return list(files)


def _write_markdown(path: Path, records: Sequence[Record]) -> None:
    write_text(path, markdown(records))


def _refuse_another_file(path: Path) -> None:
    """Raise UserError for an existing file that no earlier report wrote."""
    if not os.path.lexists(path):
        return
    if path.is_file() and _is_of_a_report(path):
        return
    raise UserError(
        f"{path} exists and no report wrote it; nothing was written: choose another --out, or "
        "move it away"
    )


def _is_of_a_report(path: Path) -> bool:
    """Look for the name of this program at the beginning; a table has nothing else in it."""
    content = path.read_bytes()
    if path.suffix != ".md":
        return figures.WRITTEN_BY.encode() in content[:1024]
    return content.startswith(b"| arm | seeds |") and all(
        line.startswith(b"|") for line in content.splitlines()
    )


def read(sources: Sequence[str | Path]) -> Sections:
    """Return what each section shows: one section per comparison, and one per single run."""
    comparisons: dict[str, list[Record]] = {}
    runs: dict[str, OneRun] = {}
    for source in map(Path, sources):
        results = source / "results.jsonl" if source.is_dir() else source
        if source.is_dir() and run_record.holds_run(source):
            runs[str(source)] = run_page.read_run(source)
        elif results.is_file():
            for record in _records(results):
                comparisons.setdefault(record["comparison"], []).append(record)
        else:
            raise UserError(
                f"{source} is neither a run's directory nor a results file of `compare`"
            )
    for name, records in comparisons.items():
        keys = [(record["arm"], record["seed"]) for record in records]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice:
            raise UserError(f"{name} has the run {twice[0]}/{twice[1]} twice")
    return {**comparisons, **runs}


def _records(path: Path) -> list[Record]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line.strip()]
        assert all("comparison" in record and "evaluations" in record for record in records)
    except (json.JSONDecodeError, AssertionError, TypeError, UnicodeDecodeError):
        raise UserError(f"{path} is no results file of `compare`") from None
    return [record | {"steps": renamed(record.get("steps", {}))} for record in records]


def page(sections: Sections, *, reloads: bool = False) -> str:
    """Return the page as HTML; `reloads`: it reloads itself."""
    runs = [content for content in sections.values() if isinstance(content, OneRun)]
    has_texts = any(run.texts for run in runs)
    return TEMPLATES.get_template("page.html").render(
        sections=[_section(name, content) for name, content in sections.items()],
        reload_seconds=RELOAD_SECONDS if reloads else None,
        written_by=figures.WRITTEN_BY,
        css=CSS + texts_section.CSS if has_texts else CSS,
        script=texts_section.SCRIPT if has_texts else None,
        digest=texts_section.script_digest(),
    )


def _section(name: str, content: list[Record] | OneRun) -> dict[str, Any]:
    """Return a section for its template; its figures have the colours of its arms."""
    if isinstance(content, OneRun):
        names, inside = [content.record["arm"]], run_page.section(name, content)
    else:
        names, inside = list(comparison.group_by_arm(content)), _comparison(content)
    palette = Palette(names, placeholders=True)
    colours = {"light": palette.css(dark=False), "dark": palette.css(dark=True)}
    return {"name": name} | inside | colours


def _comparison(records: Sequence[Record]) -> dict[str, Any]:
    """Return what the template shows of a comparison."""
    arms = comparison.group_by_arm(records)
    results = comparison.analyse(records)
    has_savings = any(result.savings for result in results)
    return {
        "template": "comparison.html",
        "what": _what(records),
        "headline": _headline(results, has_savings),
        "savings": _savings(results) if has_savings else None,
        "pictures": drawn(figures.figures(list(arms.values())), list(arms)),
        "how": how_it_was_run(records),
    }


def _what(records: Sequence[Record]) -> str:
    """Return sentences on runs, arms, seeds and prompts."""
    summary = records[0]["summary"]
    arms, seeds = ({record[key] for record in records} for key in ("arm", "seed"))
    return (
        f"{len(records)} run{'s' * (len(records) > 1)}: {len(arms)} arm{'s' * (len(arms) > 1)}, "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}. Pass rates are avg@"
        f"{summary['samples_per_prompt']} on {summary['held_out_prompts']} held-out prompts; "
        f"before training {comparison.base_pass_rate(records):.3f}."
    )


class Row(NamedTuple):
    """The numbers of an arm in a table."""

    arm: Cell
    is_ours: bool
    cells: list[Cell]


Table: TypeAlias = tuple[list[str], list[Row]]
"""Head and rows."""
QUOTAS = [f"{quota * 100:g} %" for quota in comparison.QUOTAS]


def _headline(results: Sequence[ArmResult], has_savings: bool) -> Table:
    head = ["arm", *(f"saving at {quota}" for quota in QUOTAS if has_savings)]
    head += ["final pass rate", "against random", "mean pass rate", "against random"]
    return head, [_row(r.arm, _headline_cells(r, has_savings)) for r in results]


def _savings(results: Sequence[ArmResult]) -> Table:
    """Return the table of savings in tokens and seconds."""
    columns = [(axis, i) for axis in ("tokens", "seconds") for i in range(len(QUOTAS))]
    head = ["arm", *(f"{axis}, {QUOTAS[i]}" for axis, i in columns)]
    return head, [
        _row(r.arm, [_saving(r, axis, comparison.QUOTAS[i]) for axis, i in columns])
        for r in results
    ]


def _row(arm: Arm, cells: list[Cell]) -> Row:
    count = len(arm.records)
    small = f"{count} seed{'s' * (count > 1)}" + ", a ceiling" * (arm.name == CEILING)
    return Row(Cell(arm.name, (small,)), arm.name in BOLD, cells)


def markdown(records: Sequence[Record]) -> str:
    """Return the headline table of one comparison in Markdown."""
    results = [r for r in comparison.analyse(records) if r.savings]
    quotas = [f"saving at {quota}" for quota in QUOTAS]
    head = ["arm", "seeds", *quotas, "end", "against random", "mean pass rate", "against random"]
    lines = [head, ["---"] * len(head)]
    for result in results:
        cells = _headline_cells(result, has_savings=True)
        plain = [_on_one_line(cell) for cell in cells]
        lines.append([f"`{result.arm.name}`", str(len(result.arm.records)), *plain])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _on_one_line(cell: Cell) -> str:
    """Return a number with its interval, as Markdown.

    >>> _on_one_line(Cell("< 1.2", ("1.1 to 1.3", "5/5 seeds")))
    '&lt; 1.2 (1.1 to 1.3)'
    >>> _on_one_line(Cell("1.0", ("5/5 seeds",))), _on_one_line(Cell("0.6", ("± 0.1",)))
    ('1.0', '0.6 ± 0.1')
    """
    interval = next((words for words in cell.small if not words.endswith("seeds")), "")
    if interval and not interval.startswith("±"):
        interval = f"({interval})"
    return html.escape(f"{cell.number} {interval}".rstrip(), quote=False)


def _headline_cells(result: ArmResult, has_savings: bool) -> list[Cell]:
    cells = [_saving(result, "rollouts", quota) for quota in comparison.QUOTAS if has_savings]
    cells += [_final(result.final), _difference(result.final_difference)]
    return [*cells, _final(result.mean_pass), _difference(result.mean_pass_difference)]


def _final(value: Estimate) -> Cell:
    return Cell(f"{value.value:.3f}", _half_width(value))


def _difference(value: Estimate | None) -> Cell:
    if value is None:
        return Cell("–")
    return Cell(signed(value.value), _half_width(value))


def _half_width(value: Estimate) -> tuple[str, ...]:
    return () if value.high is None else (f"± {value.high - value.value:.3f}",)


def signed(value: float) -> str:
    """Return a difference with its sign, and a typographic minus."""
    return f"{value:+.3f}".replace("-", "−")


def _saving(result: ArmResult, axis: str, quota: float) -> Cell:
    if not result.savings:
        return Cell("–")
    saving = result.savings[axis, quota]
    reached = f"{saving.reached_seeds}/{len(result.arm.records)} seeds"
    small = tuple(filter(None, (interval_words(saving), reached)))
    return Cell(f"{'< ' * saving.missed}{ratio_words(saving.ratio)}", small)


def ratio_words(ratio: float) -> str:
    """Return a ratio with two decimals, or “> 100” if the target was reached at almost no cost."""
    return f"{ratio:.2f}" if ratio < 100 else "> 100"


def interval_words(saving: Savings) -> str:
    """Return an interval as `1.10 to 1.60`, with “<” before a limit that is only bounded."""
    if saving.low is None or saving.high is None:
        return ""
    if not saving.reached_draws:
        return "no draw reaches it"
    return f"{'< ' * saving.low_missed}{ratio_words(saving.low)} to {ratio_words(saving.high)}"
