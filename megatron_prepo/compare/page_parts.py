"""Parts of a page that comparisons and single runs share: a figure, a cell, and how it was run.

The page is made by the templates in `templates/`.  They escape every value, except those that they
mark as safe: our style, our script, and matplotlib's drawings.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_prepo.compare import analysis as comparison
from megatron_prepo.compare import figures
from megatron_prepo.compare.record import Record

TEMPLATES = Environment(
    loader=PackageLoader("megatron_prepo.compare"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":")}


class Cell(NamedTuple):
    """A number, and what is written small below it."""

    number: str
    small: tuple[str, ...] = ()


def drawn(made: Sequence[figures.Figure], names: Sequence[str]) -> list[tuple[figures.Figure, str]]:
    """Return each figure with its SVG; `names` are all arms of the page's section."""
    return [(figure, figures.svg(figure, names)) for figure in made]


def how_it_was_run(records: Sequence[Record]) -> dict[str, Any]:
    """Return commands, machines and settings: what reproducing the runs requires."""
    machines = dict.fromkeys(
        ", ".join(f"{key} {value}" for key, value in r["machine"].items()) for r in records
    )
    by_arm = comparison.group_by_arm(records)
    shared = dict(records[0]["settings"])
    for record in records:
        shared = {k: v for k, v in shared.items() if record["settings"].get(k) == v}
    return {
        "commands": list(dict.fromkeys(r["command"] for r in records if r.get("command"))),
        "machines": list(machines),
        "seeds": "; ".join(f"{a.name}: {', '.join(map(str, a.seeds))}" for a in by_arm.values()),
        "is_shared": len(records) > 1,
        "settings": [f"{key}={json.dumps(value)}" for key, value in shared.items()],
    }
