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
from typing import TypeAlias

from megatron_prepo.compare import analysis as comparison
from megatron_prepo.compare import figures, run_page, texts_section
from megatron_prepo.compare import record as run_record
from megatron_prepo.compare.analysis import Arm, ArmResult, Estimate, Savings
from megatron_prepo.compare.page_parts import figure_html, foot
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
    title = " and ".join(sections)
    body = "\n".join(
        _section(name, records, i) for i, (name, records) in enumerate(sections.items())
    )
    reload = f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">\n' * reloads
    css, policy, script = CSS, "", ""
    if any(isinstance(content, OneRun) and content.texts for content in sections.values()):
        css, policy = CSS + texts_section.CSS, texts_section.policy()
        script = f"<script>{texts_section.SCRIPT}</script>\n"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="{figures.WRITTEN_BY}">\n'
        f'<meta name="color-scheme" content="light dark">\n{reload}{policy}'
        f"<title>{html.escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n{script}</body>\n</html>\n"
    )


def _section(name: str, content: list[Record] | OneRun, number: int) -> str:
    """Return a section, whose figures have the colours of its arms."""
    scope = f"s{number}"
    if isinstance(content, OneRun):
        names, inside = [content.record["arm"]], run_page.section(name, content)
    else:
        names, inside = list(comparison.group_by_arm(content)), _comparison(name, content)
    palette = Palette(names, placeholders=True)
    style = (
        f"<style>#{scope} {{{palette.css(dark=False)}}} @media (prefers-color-scheme: dark) "
        f"{{#{scope} {{{palette.css(dark=True)}}}}}</style>"
    )
    return f'<section id="{scope}">{style}\n{inside}\n</section>'


def _comparison(name: str, records: Sequence[Record]) -> str:
    arms = comparison.group_by_arm(records)
    pictures = "\n".join(figure_html(f, list(arms)) for f in figures.figures(list(arms.values())))
    return (
        f"<h1>{html.escape(name)}</h1>\n{_what(records)}\n"
        f"{_tables(comparison.analyse(records))}\n"
        f'<div class="figures">\n{pictures}\n</div>\n{foot(records)}'
    )


def _what(records: Sequence[Record]) -> str:
    """Return a paragraph on runs, arms, seeds and prompts."""
    summary = records[0]["summary"]
    arms, seeds = ({record[key] for record in records} for key in ("arm", "seed"))
    return (
        f"<p>{len(records)} run{'s' * (len(records) > 1)}: {len(arms)} arm{'s' * (len(arms) > 1)}, "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}. Pass rates are avg@"
        f"{summary['samples_per_prompt']} on {summary['held_out_prompts']} held-out prompts; "
        f"before training {comparison.base_pass_rate(records):.3f}.</p>"
    )


def _tables(results: Sequence[ArmResult]) -> str:
    """Return the headline table, and one of savings in tokens and seconds."""
    quotas = [f"{quota * 100:g} %" for quota in comparison.QUOTAS]
    has_savings = any(result.savings for result in results)
    head = ["arm", *(f"saving at {q}" for q in quotas if has_savings)]
    head += ["final pass rate", "against random", "mean pass rate", "against random"]
    rows = [_headline_cells(result, has_savings) for result in results]
    arms = [result.arm for result in results]
    parts = [_table(head, arms, rows)]
    if not has_savings:
        parts.append("<p class=note>No savings: they need runs of random that gain.</p>")
    else:
        parts.append(SAVING_WORDS)
        other = [
            [_saving(r, axis, q) for axis in ("tokens", "seconds") for q in comparison.QUOTAS]
            for r in results
        ]
        head = ["arm", *(f"{axis}, {q}" for axis in ("tokens", "seconds") for q in quotas)]
        parts += ["<h2>Savings in tokens and in seconds</h2>", _table(head, arms, other)]
    return "\n".join(parts)


SAVING_WORDS = """<p class=note>Saving: rollouts that random generates until its mean pass rate has
made 50, 75 or 100 % of its gain, divided by those of the arm until it is as high; above 1, the arm
is cheaper.
Small: the 95 % interval (bootstrap over seeds), and the number of seeds that reach the target
individually.
“&lt;”: the target was not reached within the arm’s budget, so the ratio is only bounded.
Other intervals are Student’s t over seeds; differences are paired by seed. Mean pass rate: over the
run, the area under the curve. With few seeds all intervals are rough.</p>"""


def _table(head: Sequence[str], arms: Sequence[Arm], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th scope=col>{html.escape(h)}</th>" for h in head)
    lines = []
    for number, (arm, cells) in enumerate(zip(arms, rows, strict=True)):
        count = len(arm.records)
        small = f"{count} seed{'s' * (count > 1)}"
        small += ", a ceiling" if arm.name == CEILING else ""
        label = f"{html.escape(arm.name)}<small>{small}</small>"
        bold = " class=ours" if arm.name in BOLD else ""
        dot = f'<i style="background: var(--arm-{number})"></i>'
        inside = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr{bold}><th scope=row>{dot}{label}</th>{inside}</tr>")
    body = "\n".join(lines)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f"<div class=scroll>{table}</div>"


def markdown(records: Sequence[Record]) -> str:
    """Return the headline table of one comparison in Markdown."""
    results = [r for r in comparison.analyse(records) if r.savings]
    quotas = [f"saving at {quota * 100:g} %" for quota in comparison.QUOTAS]
    head = ["arm", "seeds", *quotas, "end", "against random", "mean pass rate", "against random"]
    lines = [head, ["---"] * len(head)]
    for result in results:
        cells = _headline_cells(result, has_savings=True)
        plain = [_without_tags(cell) for cell in cells]
        lines.append([f"`{result.arm.name}`", str(len(result.arm.records)), *plain])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _headline_cells(result: ArmResult, has_savings: bool) -> list[str]:
    cells = [_saving(result, "rollouts", quota) for quota in comparison.QUOTAS if has_savings]
    cells += [_final(result.final), _difference(result.final_difference)]
    return [*cells, _final(result.mean_pass), _difference(result.mean_pass_difference)]


def _without_tags(cell: str) -> str:
    """Return a cell's number and its interval on one line.

    >>> _without_tags("1.2<small>1.1 to 1.3</small><small>5/5 seeds</small>")
    '1.2 (1.1 to 1.3)'
    >>> _without_tags("1.0<small>5/5 seeds</small>"), _without_tags("0.6<small>± 0.1</small>")
    ('1.0', '0.6 ± 0.1')
    """
    number, *small = cell.replace("</small>", "").split("<small>")
    if not small or small[0].endswith("seeds"):
        return number
    return f"{number} {small[0]}" if small[0].startswith("±") else f"{number} ({small[0]})"


def _final(value: Estimate) -> str:
    return f"{value.value:.3f}{_half_width(value)}"


def _difference(value: Estimate | None) -> str:
    if value is None:
        return "–"
    return f"{signed(value.value)}{_half_width(value)}"


def _half_width(value: Estimate) -> str:
    return "" if value.high is None else f"<small>± {value.high - value.value:.3f}</small>"


def signed(value: float) -> str:
    """Return a difference with its sign, and a typographic minus."""
    return f"{value:+.3f}".replace("-", "−")


def _saving(result: ArmResult, axis: str, quota: float) -> str:
    if not result.savings:
        return "–"
    saving = result.savings[axis, quota]
    reached = f"{saving.reached_seeds}/{len(result.arm.records)} seeds"
    interval = interval_words(saving)
    small = "".join(f"<small>{words}</small>" for words in (interval, reached) if words)
    return f"{'&lt; ' * saving.missed}{ratio_words(saving.ratio)}{small}"


def ratio_words(ratio: float) -> str:
    """Return a ratio with two decimals, or “> 100” if the target was reached at almost no cost."""
    return f"{ratio:.2f}" if ratio < 100 else "&gt; 100"


def interval_words(saving: Savings) -> str:
    """Return an interval as `1.10 to 1.60`, with “<” before a limit that is only bounded."""
    if saving.low is None or saving.high is None:
        return ""
    if not saving.reached_draws:
        return "no draw reaches it"
    return f"{'&lt; ' * saving.low_missed}{ratio_words(saving.low)} to {ratio_words(saving.high)}"


CSS = """
:root { color-scheme: light dark; --text: #1f2328; --back: #ffffff; --soft: #59636e;
  --rule: #d0d7de; --shade: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --back: #0d1117; --soft: #9aa4af;
  --rule: #3d444d; --shade: #161b22; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 16px; }
section + section { margin-top: 56px; border-top: 2px solid var(--rule); }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 24px 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 20px 0 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
dl { display: flex; flex-wrap: wrap; gap: 8px 32px; margin: 12px 0; }
dt { color: var(--soft); font-size: 0.85rem; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; white-space: nowrap; }
thead th { font-size: 0.85rem; color: var(--soft); font-weight: 600; white-space: normal;
  vertical-align: bottom; }
tbody th { position: sticky; left: 0; background: var(--back); font-weight: 500; }
.ours th, .ours td { background: var(--shade); font-weight: 700; }
td small, th small, dd small { display: block; color: var(--soft); font-size: 0.78rem;
  font-weight: 400; }
th i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 7px; }
.note, figcaption, footer { color: var(--soft); font-size: 0.88rem; }
.figures { display: grid; gap: 8px 32px; margin-top: 8px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; max-width: 620px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--shade); padding: 10px 12px;
  border-radius: 6px; font-size: 0.82rem; color: var(--text); }
footer { margin-top: 24px; border-top: 1px solid var(--rule); }
summary { cursor: pointer; }
@media (max-width: 600px) { th, td { padding: 6px 7px; font-size: 0.92rem; } }
"""
