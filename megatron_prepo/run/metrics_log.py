"""Metrics in `metrics.jsonl`, one object per step.

Keys are `group/name`, seconds are under `seconds/`.  Non-finite values are written as null.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from megatron_prepo.files.atomic import append


class MetricsLog:
    """A file of metrics to which steps are appended."""

    def __init__(self, path: str | Path) -> None:
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - as long as the run

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Append one object; it is on disk when the method returns."""
        record = {name: _finite_or_none(value) for name, value in metrics.items()}
        append(self.file, json.dumps({"step": step, **record}, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _finite_or_none(value: object) -> object:
    """Return None for NaN and infinity, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
