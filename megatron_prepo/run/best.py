"""The best checkpoint of a run so far, by one of its metrics (`checkpoint.keep_best`)."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from megatron_prepo.config import CheckpointConfig, DataConfig, EvalConfig, SelectionConfig
from megatron_prepo.errors import UserError
from megatron_prepo.run import metrics_table


@dataclass
class Best:
    """The best value so far, and the number of steps after which it was measured."""

    metric: str
    direction: str
    """`highest` or `lowest`."""
    step: int | None = None
    """Steps that the checkpoint includes; None until a value was taken."""
    value: float | None = None

    @property
    def is_of_evaluations(self) -> bool:
        """Whether evaluations have the metric; otherwise steps do."""
        return self.metric.startswith("eval/")

    def take(self, step: int, value: object) -> bool:
        """Take the value after `step` steps, and return whether it is the best so far.

        A value that is missing or not finite never is, and of equal values the first one is.

        >>> best = Best("eval/pass_rate", "highest")
        >>> [best.take(n, value) for n, value in enumerate([float("nan"), 0.5, None, 0.5, 0.75], 1)]
        [False, True, False, False, True]
        >>> best.step, best.value
        (5, 0.75)
        """
        if not is_number(value):
            return False
        if self.value is not None and not self._is_better(value, self.value):
            return False
        self.step, self.value = step, float(value)
        return True

    def _is_better(self, value: float, than: float) -> bool:
        return value > than if self.direction == "highest" else value < than

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state; one of another metric is ignored."""
        if (state["metric"], state["direction"]) == (self.metric, self.direction):
            self.step, self.value = state["step"], state["value"]


def is_record(path: Path) -> bool:
    """Return whether a file is a `best.json`, by its keys, and no link."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() == {"checkpoint", *vars(Best("", ""))}


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a metric's value can be compared: neither missing nor infinite nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def of(settings: CheckpointConfig) -> Best | None:
    """Return the record of the best checkpoint; None if none is asked for."""
    return Best(settings.keep_best, settings.best_is) if settings.keep_best else None


def check(
    settings: CheckpointConfig, evaluation: EvalConfig, data: DataConfig, selection: SelectionConfig
) -> None:
    """Raise UserError if a run with these settings never has the metric `checkpoint.keep_best`."""
    metric = settings.keep_best
    if metric is None:
        return
    if not metric.startswith("eval/"):
        if not metrics_table.is_of_a_step(metric, custom_selector=selection.is_custom):
            raise UserError(
                f"checkpoint.keep_best={metric} is no metric of a step (docs/metrics.md lists "
                f"them) and none of evaluations: {', '.join(_of_evaluations(evaluation, data))}"
            )
        return
    if metric not in (known := list(_of_evaluations(evaluation, data))):
        raise UserError(
            f"checkpoint.keep_best={metric}: evaluations during the run, of eval.samples_during="
            f"{evaluation.samples_during} samples, have {', '.join(known)}"
        )
    if not evaluation.every:
        raise UserError(
            f"checkpoint.keep_best={metric} compares evaluations during the run, and "
            "eval.every=0 asks for none; set it, for example to 10"
        )


def _of_evaluations(evaluation: EvalConfig, data: DataConfig) -> Iterable[str]:
    """Return the metrics by which evaluations during the run can be compared."""
    pass_at = [f"pass_at_{k}" for k in evaluation.pass_at if k <= evaluation.samples_during]
    for name in dict.fromkeys(["", *data.eval_files]):
        for quantity in ("pass_rate", *pass_at):
            yield f"eval/{name}/{quantity}" if name else f"eval/{quantity}"
