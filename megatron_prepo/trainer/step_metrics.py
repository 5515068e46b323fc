"""What is measured in a step, and where it is written.

`metrics.jsonl` has one object per step; keys are `group/name`, seconds are under `seconds/`.

A mean is over what there was: a key is absent where there was nothing (no update was made, no token
had an advantage), and null where the value is not a finite number.  Neither is ever counted as 0.
`loss/` and `train/` are means over the step's optimizer updates; what they and `mismatch/` average
are tokens of all ranks, so that the layout changes no value but by rounding.
"""

import json
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from scipy import stats
from torch.profiler import record_function

from megatron_prepo.files.atomic import append
from megatron_prepo.prepo.advantages import zero_variance
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.run.dashboards import TensorBoard, WandB
from megatron_prepo.selection.base import Candidates


class Stopwatch:
    """Seconds by stage, in all and since the last step; a trace has the stages under their names.

    On CUDA a stage ends when the device is done with it: else its seconds would be the next one's.
    """

    def __init__(self):
        self.total: dict[str, float] = defaultdict(float)
        self._before_step: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage; several visits add up."""
        start = time.perf_counter()
        try:
            with record_function(stage), _nvtx_range(stage):
                yield
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
        finally:
            self.total[stage] += time.perf_counter() - start

    def so_far(self, stage: str) -> float:
        """Seconds of a stage since the last call of `of_step`."""
        return self.total[stage] - self._before_step.get(stage, 0.0)

    def of_step(self) -> dict[str, float]:
        """Seconds of each stage since the last call."""
        step = {stage: s - self._before_step.get(stage, 0.0) for stage, s in self.total.items()}
        self._before_step = dict(self.total)
        return step

    def restore(self, total: dict[str, float]) -> None:
        """Continue from seconds that an earlier process measured."""
        self.total.update(total)
        self._before_step = dict(self.total)


def _nvtx_range(name: str):
    return torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()


class MetricsLog:
    """Appends to `metrics.jsonl`, and shows the same on dashboards."""

    def __init__(self, path: str | Path, dashboards: Sequence[TensorBoard | WandB] = ()):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - as long as the run
        self._dashboards = dashboards

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One object; on disk when the method returns."""
        record = {name: _finite_or_none(value) for name, value in metrics.items()}
        append(self._file, json.dumps({"step": step, **record}, allow_nan=False) + "\n")
        for dashboard in self._dashboards:
            dashboard.write(step, metrics)

    def close(self) -> None:
        """No more metrics; dashboards are closed by those who made them."""
        self._file.close()


def _finite_or_none(value):
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def selection_metrics(
    candidates: Candidates, chosen: Sequence[int], rewards_KG: torch.Tensor
) -> dict[str, float]:
    """Of all groups paid for: rewards, perplexities, and how well these foretell."""
    metrics = {
        "reward/mean": float(rewards_KG.mean()),
        "reward/zero_variance_ratio": float(zero_variance(rewards_KG).double().mean()),
        "selection/groups_paid": len(chosen),
    }
    if candidates.ppl_P is not None:
        ppl_P, ppl_K = candidates.ppl_P, candidates.ppl_P[list(chosen)]
        metrics |= quantiles("ppl/candidates", ppl_P) | quantiles("ppl/selected", ppl_K)
        metrics["ppl/selected_mean"] = float(ppl_K.mean())
        metrics["ppl/spearman_with_reward"] = spearman(ppl_K, rewards_KG.mean(dim=1))
        if candidates.pass_rate_P is not None:
            metrics |= candidate_metrics(candidates)
        if candidates.actor_ppl_P is not None:
            relative_P = (ppl_P / candidates.actor_ppl_P - 1).abs()
            metrics["ppl/engine_actor_relative_max"] = float(relative_P.max())
            metrics["ppl/engine_actor_spearman"] = spearman(ppl_P, candidates.actor_ppl_P)
    return metrics


def grading_metrics(grades: Sequence[Grade]) -> dict[str, float]:
    """How many answers broke a limit or made the reward function raise."""
    return {
        "reward/failed_ratio": sum(grade.outcome != "ok" for grade in grades) / len(grades),
        "seconds/slowest_answer": max(grade.seconds for grade in grades),
    }


def candidate_metrics(candidates: Candidates) -> dict[str, float]:
    """Of all candidates, where their pass rates are known: what perplexity says about them."""
    by_perplexity = candidates.pass_rate_P[candidates.ppl_P.argsort(stable=True)]
    lengths_P = torch.tensor([float(len(prompt.tokens)) for prompt in candidates.prompts])
    return {
        "candidates/pass_rate": float(candidates.pass_rate_P.mean()),
        "candidates/spearman_ppl": spearman(candidates.ppl_P, candidates.pass_rate_P),
        "candidates/spearman_length": spearman(lengths_P, candidates.pass_rate_P),
        **{
            f"candidates/pass_rate_ppl_decile_{i}": float(decile.mean())
            for i, decile in enumerate(by_perplexity.tensor_split(10))
            if len(decile)
        },
    }


def rollout_metrics(
    entropy_N: torch.Tensor,
    weight_N: torch.Tensor,
    lengths_N: torch.Tensor,
    finished_N: Sequence[bool],
) -> dict[str, float]:
    """Entropies, weights and lengths."""
    return {
        "entropy/mean": float((entropy_N * lengths_N).sum() / lengths_N.sum()),
        "weight/mean": float(weight_N.mean()),
        "weight/std": float(weight_N.std()),
        **quantiles("entropy/sequence", entropy_N),
        **quantiles("weight", weight_N),
        "rollout/length": float(lengths_N.double().mean()),
        "rollout/finished_ratio": sum(finished_N) / len(finished_N),
    }


def quantiles(name: str, values: torch.Tensor) -> dict[str, float]:
    """Minimum, quartiles and maximum."""
    values, points = values.double(), {"q25": 0.25, "q50": 0.5, "q75": 0.75}
    return {
        f"{name}_min": float(values.min()),
        **{f"{name}_{label}": float(torch.quantile(values, q)) for label, q in points.items()},
        f"{name}_max": float(values.max()),
    }


def spearman(x_K: torch.Tensor, y_K: torch.Tensor) -> float | None:
    """Rank correlation; None where one side is constant, has a NaN or is a single value."""
    if len(x_K) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        value = float(stats.spearmanr(x_K.numpy(), y_K.numpy()).statistic)
    return value if value == value else None
