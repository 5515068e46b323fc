"""The seconds of each stage of a step."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

from megatron_prepo.process import activity

ACTIVITIES = {
    "setup": "setting up",
    "perplexity": "perplexity of the candidates",
    "probes": "probes",
    "rollouts": "generating rollouts",
    "rewards": "grading",
    "old_logprobs": "scoring the rollouts",
    "update": "update",
    "weight_sync": "weight sync",
    "evaluate": "evaluating",
    "checkpoint": "saving a checkpoint",
    "export": "exporting the model",
}
"""What a stage is called while it lasts."""


class Stopwatch:
    """Seconds per stage, in total and since the last step; traces show the stages by name.

    On CUDA a stage ends with a synchronization; without it, its time would count for a later stage.
    """

    def __init__(self) -> None:
        self.total: dict[str, float] = defaultdict(float)
        self._before_step: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage; repeated calls add up."""
        start = time.perf_counter()
        try:
            with activity.doing(ACTIVITIES[stage]), record_function(stage), _nvtx_range(stage):
                yield
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
        finally:
            self.total[stage] += time.perf_counter() - start

    def so_far(self, stage: str) -> float:
        """Return the seconds of a stage since the last call of `of_step`."""
        return self.total[stage] - self._before_step.get(stage, 0.0)

    def of_step(self) -> dict[str, float]:
        """Return the seconds of each stage since the last call."""
        step = {stage: s - self._before_step.get(stage, 0.0) for stage, s in self.total.items()}
        self._before_step = dict(self.total)
        return step

    def restore(self, total: dict[str, float]) -> None:
        """Continue from seconds that an earlier process measured."""
        self.total.update(total)
        self._before_step = dict(self.total)


def _nvtx_range(name: str) -> AbstractContextManager[None]:
    if not torch.cuda.is_available():
        return nullcontext()
    named: AbstractContextManager[None] = torch.cuda.nvtx.range(name)
    return named
