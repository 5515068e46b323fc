"""The texts of a run on its page (`run/texts.py`): data for `texts.js`, which shows them on demand.

A text of a model or of a data set may hold anything, also HTML.  Texts are embedded as JSON without
any `<` (jinja2's `tojson`), so that none of them ends its element, and the page allows no script
but ours.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prepo.errors import UserError
from megatron_prepo.run.texts import Kind, file_name, spread

MAX_BYTES = 24 << 20
"""Largest size of the lines of a kind on a page; of longer files it has some lines, evenly spread.
A browser shows a page of this size within seconds."""

TITLES: dict[Kind, str] = {"rollouts": "Rollouts", "evaluations": "Evaluations"}

SCRIPT = Path(__file__).with_name("texts.js").read_text(encoding="utf-8")
CSS = Path(__file__).with_name("texts.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class KeptTexts:
    """The lines of one kind that a page shows."""

    kind: Kind
    lines: list[dict[str, Any]]
    total: int
    """Number of lines in the file."""

    @property
    def title(self) -> str:
        """Title of the section."""
        return TITLES[self.kind]

    @property
    def note(self) -> str:
        """Names the file with all lines, if some are not shown."""
        if len(self.lines) == self.total:
            return ""
        return (
            f"{len(self.lines):,} of {self.total:,}, evenly spread, since a page has at most "
            f"{MAX_BYTES >> 20} MiB of them: {file_name(self.kind)} in the run's directory has all."
        )


def read_texts(directory: Path) -> list[KeptTexts]:
    """Return the texts of the run in this directory, without kinds of which it has none.

    Raises UserError that names a damaged line.
    """
    kinds = [_read(directory / file_name(kind), kind) for kind in TITLES]
    return [texts for texts in kinds if texts.lines]


def _read(path: Path, kind: Kind) -> KeptTexts:
    if not path.is_file():
        return KeptTexts(kind, [], 0)
    sizes = [len(line) for line in _complete_lines(path)]
    # first and last at least: the beginning of a run, and where it is now
    count = max(2, len(sizes) * MAX_BYTES // max(1, sum(sizes)))
    shown = set(spread(len(sizes), count))
    lines = [
        _parsed(line, f"{path}, line {i + 1}")
        for i, line in enumerate(_complete_lines(path))
        if i in shown
    ]
    return KeptTexts(kind, lines, len(sizes))


def _complete_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; an incomplete last line is skipped."""
    with open(path, "rb") as lines:
        yield from (line for line in lines if line.endswith(b"\n"))


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(line)
        assert {"step", "prompts"} <= parsed.keys()
        return parsed
    except (ValueError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{where} is damaged: no texts of a step; remove the line, or the file"
        ) from error


def script_digest() -> str:
    """Return the SHA-256 of our script, by which the page's policy allows it and no other."""
    return base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
