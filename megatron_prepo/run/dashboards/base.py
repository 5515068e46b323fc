"""What each dashboard can do, and what several of them share."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

Rows: TypeAlias = Sequence[Mapping[str, Any]]
"""The rows of a table by column, of which there is at least one (`run/texts.py`)."""


class Dashboard(Protocol):
    """A dashboard that shows a run; a resumed run continues in it."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show finite numbers of a step, or of an evaluation after `step` steps."""

    def write_texts(self, step: int, name: str, rows: Rows) -> None:
        """Show the texts that a step or an evaluation keeps, one completion per row."""

    def write_picture(self, step: int, path: Path) -> None:
        """Show a PNG file, under the file's name."""

    def close(self) -> None:
        """Store what is not stored yet; nothing is written afterwards."""


def numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    """Return those metrics that a dashboard can draw.

    >>> numbers({"a": 2, "b": 0.5, "c": None, "d": float("nan"), "e": [1]})
    {'a': 2, 'b': 0.5}
    """
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
