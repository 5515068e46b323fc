"""Pass rates and rollouts saved, computed from the records of a comparison.

The estimand is the ratio of the cost of `random` to the cost of another arm until the mean pass
rate over its seeds first reaches a target.  Intervals are over seeds.  Everything is arithmetic on
records (`record.py`); only the bootstrap is random, and it is seeded.  `docs/compare.md` has the
definitions in words.

Letters: S seeds of an arm, M points of their common grid, D draws of the bootstrap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from megatron_prepo.compare.record import Record

BASELINE = "random"
AXES = ("rollouts", "tokens", "seconds")
QUOTAS = (0.5, 0.75, 1.0)
"""Fractions of the baseline's gain; each defines a target."""

DRAWS = 2000
"""Draws of the bootstrap."""
PROBES = {"rollouts": "probes", "tokens": "probe_tokens", "seconds": "probe_seconds"}
"""Key in an evaluation's record for the part of each axis used by an oracle's probes."""

Floats: TypeAlias = NDArray[np.float64]
Number = TypeVar("Number", float, Floats)
Curve: TypeAlias = tuple[Floats, Floats]
"""Cost and pass rate, `x_M` and `y_M`."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95 % t-interval, which is None for a single seed."""

    value: float
    low: float | None
    high: float | None
    num_seeds: int


@dataclass(frozen=True)
class Savings:
    """The baseline's cost to reach the target over the arm's cost; above 1, the arm is cheaper.

    An arm, or a draw, that misses the target within its budget only bounds the ratio from above.
    """

    ratio: float
    missed: bool
    """The arm's mean curve does not reach the target: the true ratio is below `ratio`."""
    low: float | None
    """95 % interval by bootstrap over seeds; None with a single seed on either side."""
    low_missed: bool
    """More than 2.5 % of the draws miss, so the true lower limit may be below `low`."""
    high: float | None
    reached_draws: float | None
    """Fraction of draws that reach the target."""
    reached_seeds: int
    """Number of seeds whose individual curve reaches it."""
    paid: float
    """Cost until the target in the axis' unit, or the complete budget if it is missed."""


@dataclass(frozen=True)
class Arm:
    """The runs of an arm, ordered by seed."""

    name: str
    records: tuple[Record, ...]

    @property
    def seeds(self) -> list[int]:
        """Seeds in ascending order."""
        return [record["seed"] for record in self.records]

    def curves(self, axis: str) -> list[Curve]:
        """Return the smoothed curve of each run."""
        return [curve(record, axis) for record in self.records]

    @cached_property
    def finals_S(self) -> Floats:
        """Pass rate of each run at its last evaluation."""
        return np.array([y_M[-1] for _, y_M in self.curves("rollouts")])

    def mean_passes_S(self, budget: float) -> Floats:
        """Return each run's mean pass rate over the budget, from the area under its curve."""
        return np.array([area(x_M, y_M, budget) for x_M, y_M in self.curves("rollouts")])


@dataclass(frozen=True)
class ArmResult:
    """One row of the headline table."""

    arm: Arm
    final: Estimate
    final_difference: Estimate | None
    """Difference from the baseline, paired by seed."""
    mean_pass: Estimate
    """Mean pass rate over the baseline's budget of rollouts: the area under the curve."""
    mean_pass_difference: Estimate | None
    savings: dict[tuple[str, float], Savings]
    """Savings by axis and quota; empty unless the baseline gains."""


def group_by_arm(records: Sequence[Record]) -> dict[str, Arm]:
    """Return the arms of one comparison, in the order of the records."""
    names = dict.fromkeys(record["arm"] for record in records)
    return {
        name: Arm(
            name,
            tuple(sorted((r for r in records if r["arm"] == name), key=lambda r: r["seed"])),
        )
        for name in names
    }


def analyse(records: Sequence[Record]) -> list[ArmResult]:
    """Return the numbers of each arm of one comparison."""
    arms = group_by_arm(records)
    baseline = arms.get(BASELINE)
    ends = [x_M[-1] for a in [baseline] if a for x_M, _ in a.curves("rollouts")]
    ends = ends or [x_M[-1] for a in arms.values() for x_M, _ in a.curves("rollouts")]
    budget = float(min(ends))
    base = base_pass_rate(records)

    def difference(arm: Arm, values: Callable[[Arm], Floats]) -> Estimate | None:
        if baseline is None or arm is baseline:
            return None
        return paired(arm.seeds, values(arm), baseline.seeds, values(baseline))

    def final(arm: Arm) -> Floats:
        return arm.finals_S

    def mean_pass(arm: Arm) -> Floats:
        return arm.mean_passes_S(budget)

    return [
        ArmResult(
            arm,
            final=estimate(final(arm)),
            final_difference=difference(arm, final),
            mean_pass=estimate(mean_pass(arm)),
            mean_pass_difference=difference(arm, mean_pass),
            savings={
                (axis, quota): saving(arm, baseline, axis, quota, base)
                for axis in AXES
                for quota in QUOTAS
                if baseline and baseline.finals_S.mean() > base
            },
        )
        for arm in arms.values()
    ]


def base_pass_rate(records: Sequence[Record]) -> float:
    """Return the mean pass rate before training over all runs, which start from equal weights."""
    return float(np.mean([record["evaluations"][0]["pass_rate"] for record in records]))


def target(base: float, final: Number, quota: float) -> Number:
    """Return the pass rate at which the baseline has made this fraction of its gain."""
    return base + quota * (final - base)


def curve(record: Record, axis: str) -> Curve:
    """Return a run's cost and pass rate, `x_M` and `y_M`, smoothed over three evaluations.

    Both coordinates are averages weighted by the evaluations' samples, so a straight line stays
    straight.  The first and the last point stay as measured: a run is judged by them, and they have
    the most samples.  An oracle's probes are not counted.
    """
    points = record["evaluations"]
    x = np.array([p[axis] - p.get(PROBES[axis], 0) for p in points], dtype=float)
    y = np.array([p["pass_rate"] for p in points], dtype=float)
    weight = np.array([p["samples_per_prompt"] for p in points], dtype=float)

    def smoothed(values: Floats) -> Floats:
        of_three = np.lib.stride_tricks.sliding_window_view
        inner = of_three(values * weight, 3).sum(1) / of_three(weight, 3).sum(1)
        return np.concatenate([values[:1], inner, values[-1:]])

    return (smoothed(x), smoothed(y)) if len(points) > 2 else (x, y)


def on_common_grid(curves: Sequence[Curve]) -> tuple[Floats, Floats]:
    """Return `x_M` and `y_SM`: each curve interpolated at the points of all curves.

    After its last point a curve keeps its last value, so that the mean ends at the mean of the
    ends.
    """
    x_M = np.unique(np.concatenate([x for x, _ in curves]))
    return x_M, np.stack([np.interp(x_M, x, y) for x, y in curves])


def first_reached(x_M: Floats, y_DM: Floats, target_D: Floats) -> Floats:
    """Return where each row first reaches its target, interpolated; NaN if it never does.

    >>> x, y = np.array([0.0, 10.0, 20.0]), np.array([[0.0, 1.0, 0.5]])
    >>> first_reached(x, y, np.array([0.5])), first_reached(x, y, np.array([2.0]))
    (array([5.]), array([nan]))
    """
    reached_DM = y_DM >= target_D[:, None] - 1e-12
    first_D = reached_DM.argmax(axis=1)
    before_D = np.maximum(first_D - 1, 0)
    rows = np.arange(len(y_DM))
    y0_D, y1_D = y_DM[rows, before_D], y_DM[rows, first_D]
    rise_D = np.where(y1_D > y0_D, y1_D - y0_D, 1.0)
    share_D = np.clip((target_D - y0_D) / rise_D, 0.0, 1.0)
    x_D = x_M[before_D] + share_D * (x_M[first_D] - x_M[before_D])
    return np.where(reached_DM.any(axis=1), x_D, np.nan)


def saving(
    arm: Arm, baseline: Arm, axis: str, quota: float, base: float, draws: int = DRAWS
) -> Savings:
    """Return the arm's saving at one target, and its interval."""
    x_M, y_SM = on_common_grid(arm.curves(axis))
    x_of_baseline_M, y_of_baseline_SM = on_common_grid(baseline.curves(axis))

    def ratios(
        weights_DS: Floats, weights_of_baseline_DS: Floats
    ) -> tuple[Floats, NDArray[np.bool_], Floats]:
        final_D = weights_of_baseline_DS @ baseline.finals_S
        target_D = target(base, final_D, quota)
        theirs_D = first_reached(
            x_of_baseline_M, weights_of_baseline_DS @ y_of_baseline_SM, target_D
        )
        ours_D = first_reached(x_M, weights_DS @ y_SM, target_D)
        paid_D = np.where(np.isnan(ours_D), x_M[-1], ours_D)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio_D = theirs_D / paid_D
        # a draw in which the baseline does not gain has no target
        return np.where(final_D > base, ratio_D, np.nan), np.isnan(ours_D), paid_D

    num_ours, num_theirs = len(arm.records), len(baseline.records)
    (ratio,), (missed,), (paid,) = ratios(even_weights(num_ours), even_weights(num_theirs))
    goal = target(base, float(baseline.finals_S.mean()), quota)
    alone_S = first_reached(x_M, y_SM, np.full(num_ours, goal))
    low = high = reached_draws = None
    low_missed = False
    if arm is not baseline and min(num_ours, num_theirs) > 1:
        random = np.random.default_rng(0)
        ratio_D, missed_D, _ = ratios(
            drawn_weights(random, draws, num_ours), drawn_weights(random, draws, num_theirs)
        )
        known_D = ~np.isnan(ratio_D)
        order_D = ratio_D[known_D].argsort(kind="stable")
        sorted_D, sorted_missed_D = ratio_D[known_D][order_D], missed_D[known_D][order_D]
        first, last = (min(int(q * len(sorted_D)), len(sorted_D) - 1) for q in (0.025, 0.975))
        low, high = float(sorted_D[first]), float(sorted_D[last])
        # the ratio of a missed draw is only bounded: with this many, the limit may be lower too
        low_missed = bool(sorted_missed_D.mean() > 0.025)
        reached_draws = float(1 - sorted_missed_D.mean())
    return Savings(
        ratio=float(ratio),
        missed=bool(missed),
        low=low,
        low_missed=low_missed,
        high=high,
        reached_draws=reached_draws,
        reached_seeds=int((~np.isnan(alone_S)).sum()),
        paid=float(paid),
    )


def even_weights(num_seeds: int) -> Floats:
    """Return the weights of the plain mean over seeds, as a single draw."""
    return np.full((1, num_seeds), 1 / num_seeds)


def drawn_weights(random: np.random.Generator, draws: int, num_seeds: int) -> Floats:
    """Return each seed's weight in the mean of `num_seeds` seeds drawn with replacement."""
    drawn_DS = random.integers(num_seeds, size=(draws, num_seeds))
    return np.stack([(drawn_DS == s).mean(axis=1) for s in range(num_seeds)], axis=1)


def area(x_M: Floats, y_M: Floats, budget: float) -> float:
    """Return the mean of a curve over [0, budget]; after its end it keeps its last value."""
    inner = x_M[(x_M > 0) & (x_M < budget)]
    x = np.concatenate([[0.0], inner, [budget]])
    y = np.interp(x, x_M, y_M)
    return float(np.sum((y[1:] + y[:-1]) / 2 * np.diff(x)) / budget)


def estimate(values_S: Floats) -> Estimate:
    """Return the mean and its 95 % t-interval."""
    count, mean = len(values_S), float(np.mean(values_S))
    if count < 2:
        return Estimate(mean, None, None, count)
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values_S, ddof=1) / np.sqrt(count))
    return Estimate(mean, mean - half, mean + half, count)


def paired(
    seeds: Sequence[int], values_S: Floats, other_seeds: Sequence[int], others_S: Floats
) -> Estimate | None:
    """Return the mean difference over the seeds that both have; None if there is no such seed."""
    other = dict(zip(other_seeds, others_S, strict=True))
    both = [v - other[s] for s, v in zip(seeds, values_S, strict=True) if s in other]
    return estimate(np.array(both)) if both else None


def mean_and_band(
    curves: Sequence[Curve],
) -> tuple[Floats, Floats, Floats | None]:
    """Return grid, mean over seeds, and half the width of its pointwise 95 % t-interval."""
    x_M, y_SM = on_common_grid(curves)
    count = len(curves)
    if count < 2:
        return x_M, y_SM.mean(axis=0), None
    half_M = stats.t.ppf(0.975, count - 1) * y_SM.std(axis=0, ddof=1) / np.sqrt(count)
    return x_M, y_SM.mean(axis=0), half_M
