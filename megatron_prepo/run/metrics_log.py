"""Where metrics are written: `metrics.jsonl`, one object per step, and dashboards.

Keys are `group/name`, seconds are under `seconds/`.  A value that is not finite is null.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_prepo.files.atomic import append
from megatron_prepo.run.dashboards import TensorBoard, WandB


class MetricsLog:
    """Appends to `metrics.jsonl`, and shows the same on dashboards."""

    def __init__(self, path: str | Path, dashboards: Sequence[TensorBoard | WandB] = ()) -> None:
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - as long as the run
        self._dashboards = dashboards

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """One object; on disk when the method returns."""
        record = {name: _finite_or_none(value) for name, value in metrics.items()}
        append(self.file, json.dumps({"step": step, **record}, allow_nan=False) + "\n")
        for dashboard in self._dashboards:
            dashboard.write(step, metrics)

    def close(self) -> None:
        """No more metrics; dashboards are closed by those who made them."""
        self.file.close()


def _finite_or_none(value: object) -> object:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
