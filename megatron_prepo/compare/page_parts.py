"""Parts of a page that comparisons and single runs share: a figure, and how it was run."""

import html
import json
from collections.abc import Sequence

from megatron_prepo.compare import analysis as comparison
from megatron_prepo.compare import figures
from megatron_prepo.compare.record import Record


def figure_html(figure: figures.Figure, names: Sequence[str]) -> str:
    """Return a figure with its title and caption; `names` are all arms of the page's section."""
    drawn = figures.svg(figure, names).replace(
        "<svg ", f'<svg role="img" aria-label="{html.escape(figure.title)}" ', 1
    )
    return (
        f"<figure><h2>{html.escape(figure.title)}</h2>\n{drawn}\n"
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
    )


def foot(records: Sequence[Record]) -> str:
    """Return commands, machines and settings: what reproducing the runs requires."""
    commands = dict.fromkeys(r["command"] for r in records if r.get("command"))
    machines = dict.fromkeys(
        ", ".join(f"{key} {value}" for key, value in r["machine"].items()) for r in records
    )
    by_arm = comparison.group_by_arm(records)
    seeds = "; ".join(f"{a.name}: {', '.join(map(str, a.seeds))}" for a in by_arm.values())
    shared = dict(records[0]["settings"])
    for record in records:
        shared = {k: v for k, v in shared.items() if record["settings"].get(k) == v}
    settings = "\n".join(f"{key}={json.dumps(value)}" for key, value in shared.items())
    parts = [f"<pre>{html.escape(chr(10).join(commands))}</pre>"] if commands else []
    parts += [f"<p>{html.escape(machine)}</p>" for machine in machines]
    parts.append(f"<p>Seeds: {html.escape(seeds)}</p>")
    of = "Settings that all runs share" if len(records) > 1 else "Settings"
    parts.append(
        f"<details><summary>{of}, except defaults</summary>"
        f"<pre>{html.escape(settings)}</pre></details>"
    )
    return f"<footer><h2>How it was run</h2>{''.join(parts)}</footer>"
