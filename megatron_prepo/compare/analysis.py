"""What the records of a comparison say: pass rates, and rollouts saved, with intervals over seeds.

The estimand is the ratio of what `random` pays to what another arm pays until the mean pass rate of
its seeds first reaches a target.  All of it is arithmetic on records (`record.py`), and nothing is
random but the bootstrap, which is seeded.  `docs/compare.md` has the definitions in words.

Letters: S seeds of an arm, M points of their common grid, D draws of the bootstrap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

BASELINE = "random"
AXES = ("rollouts", "tokens", "seconds")
QUOTAS = (0.5, 0.75, 1.0)
"""Shares of the baseline's gain that are the targets."""

DRAWS = 2000
PROBES = {"rollouts": "probes", "tokens": "probe_tokens", "seconds": "probe_seconds"}
"""What an evaluation's record calls the part of each axis that an oracle's probes took."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and its 95 % t-interval; without one for a single seed."""

    value: float
    low: float | None
    high: float | None
    num_seeds: int


@dataclass(frozen=True)
class Savings:
    """What the baseline pays to the target over what the arm pays: above 1, the arm is cheaper.

    A draw or an arm that misses the target within its budget bounds the ratio from above only.
    """

    ratio: float
    missed: bool
    """The arm's mean curve does not reach the target: the true ratio is below `ratio`."""
    low: float | None
    """95 % interval by bootstrap over seeds; empty with a single seed on either side."""
    low_missed: bool
    """The lower limit is itself a draw that misses: it lies below `low`."""
    high: float | None
    reached_draws: float | None
    """Share of draws that reach the target."""
    reached_seeds: int
    """Seeds that reach it on their own."""
    paid: float
    """Of the axis' unit, until the target: or the whole budget, if it is missed."""


@dataclass(frozen=True)
class Arm:
    """An arm's runs, seed by seed."""

    name: str
    records: tuple[dict, ...]

    @property
    def seeds(self) -> list[int]:
        """In order."""
        return [record["seed"] for record in self.records]

    def curves(self, axis: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each run's smoothed curve."""
        return [curve(record, axis) for record in self.records]

    @cached_property
    def finals_S(self) -> np.ndarray:
        """Each run's last point."""
        return np.array([y_M[-1] for _, y_M in self.curves("rollouts")])

    def mean_passes_S(self, budget: float) -> np.ndarray:
        """Each run's mean pass rate over the budget: the area under its curve, by its width."""
        return np.array([area(x_M, y_M, budget) for x_M, y_M in self.curves("rollouts")])


@dataclass(frozen=True)
class ArmResult:
    """One line of the headline table."""

    arm: Arm
    final: Estimate
    final_difference: Estimate | None
    """To the baseline, paired by seed."""
    mean_pass: Estimate
    """Mean pass rate over the baseline's budget of rollouts: the area under the curve."""
    mean_pass_difference: Estimate | None
    savings: dict[tuple[str, float], Savings]
    """By axis and quota; empty without a baseline that gains."""


def group_by_arm(records: Sequence[dict]) -> dict[str, Arm]:
    """The arms of one comparison, in the order of the records."""
    names = dict.fromkeys(record["arm"] for record in records)
    return {
        name: Arm(
            name,
            tuple(sorted((r for r in records if r["arm"] == name), key=lambda r: r["seed"])),
        )
        for name in names
    }


def analyse(records: Sequence[dict]) -> list[ArmResult]:
    """All numbers of one comparison, an arm each."""
    arms = group_by_arm(records)
    baseline = arms.get(BASELINE)
    ends = [x_M[-1] for a in [baseline] if a for x_M, _ in a.curves("rollouts")]
    ends = ends or [x_M[-1] for a in arms.values() for x_M, _ in a.curves("rollouts")]
    budget = min(ends)
    base = base_pass_rate(records)
    results = []
    for arm in arms.values():
        other = baseline if baseline and arm is not baseline else None
        mean_passes_S = arm.mean_passes_S(budget)
        results.append(
            ArmResult(
                arm,
                final=estimate(arm.finals_S),
                final_difference=other
                and paired(arm.seeds, arm.finals_S, other.seeds, other.finals_S),
                mean_pass=estimate(mean_passes_S),
                mean_pass_difference=other
                and paired(arm.seeds, mean_passes_S, other.seeds, other.mean_passes_S(budget)),
                savings={
                    (axis, quota): saving(arm, baseline, axis, quota, base)
                    for axis in AXES
                    for quota in QUOTAS
                    if baseline and baseline.finals_S.mean() > base
                },
            )
        )
    return results


def base_pass_rate(records: Sequence[dict]) -> float:
    """Pass rate before training: all runs start from the same weights, so over all of them."""
    return float(np.mean([record["evaluations"][0]["pass_rate"] for record in records]))


def target(base: float, final: float, quota: float) -> float:
    """The pass rate at which a share of the baseline's gain is made."""
    return base + quota * (final - base)


def curve(record: dict, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """A run's pass rate against what it paid: `x_M`, `y_M`, smoothed over three evaluations.

    Both coordinates are averaged, by the evaluations' samples, so a straight line stays what it is.
    The first and the last point stay as measured: they are what a run is judged by, and have the
    most samples.  An oracle's probes are not counted.
    """
    points = record["evaluations"]
    x = np.array([p[axis] - p.get(PROBES[axis], 0) for p in points], dtype=float)
    y = np.array([p["pass_rate"] for p in points], dtype=float)
    weight = np.array([p["samples_per_prompt"] for p in points], dtype=float)

    def smoothed(values: np.ndarray) -> np.ndarray:
        of_three = np.lib.stride_tricks.sliding_window_view
        inner = of_three(values * weight, 3).sum(1) / of_three(weight, 3).sum(1)
        return np.concatenate([values[:1], inner, values[-1:]])

    return (smoothed(x), smoothed(y)) if len(points) > 2 else (x, y)


def on_common_grid(
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """`x_M` and `y_SM`: all curves at every point that any of them has.

    Behind its own end a run counts with its last value, so that the mean ends on the mean of ends.
    """
    x_M = np.unique(np.concatenate([x for x, _ in curves]))
    return x_M, np.stack([np.interp(x_M, x, y) for x, y in curves])


def first_reached(x_M: np.ndarray, y_DM: np.ndarray, target_D: np.ndarray) -> np.ndarray:
    """Where each row first reaches its target, interpolated; NaN where it never does.

    >>> x, y = np.array([0.0, 10.0, 20.0]), np.array([[0.0, 1.0, 0.5]])
    >>> first_reached(x, y, np.array([0.5])), first_reached(x, y, np.array([2.0]))
    (array([5.]), array([nan]))
    """
    there_DM = y_DM >= target_D[:, None] - 1e-12
    first_D = there_DM.argmax(axis=1)
    before_D = np.maximum(first_D - 1, 0)
    rows = np.arange(len(y_DM))
    y0_D, y1_D = y_DM[rows, before_D], y_DM[rows, first_D]
    rise_D = np.where(y1_D > y0_D, y1_D - y0_D, 1.0)
    share_D = np.clip((target_D - y0_D) / rise_D, 0.0, 1.0)
    x_D = x_M[before_D] + share_D * (x_M[first_D] - x_M[before_D])
    return np.where(there_DM.any(axis=1), x_D, np.nan)


def saving(
    arm: Arm, baseline: Arm, axis: str, quota: float, base: float, draws: int = DRAWS
) -> Savings:
    """The arm's saving at one target, and its interval."""
    x_M, y_SM = on_common_grid(arm.curves(axis))
    x_of_baseline_M, y_of_baseline_SM = on_common_grid(baseline.curves(axis))

    def ratios(shares_DS, shares_of_baseline_DS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        final_D = shares_of_baseline_DS @ baseline.finals_S
        target_D = target(base, final_D, quota)
        theirs_D = first_reached(
            x_of_baseline_M, shares_of_baseline_DS @ y_of_baseline_SM, target_D
        )
        ours_D = first_reached(x_M, shares_DS @ y_SM, target_D)
        paid_D = np.where(np.isnan(ours_D), x_M[-1], ours_D)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio_D = theirs_D / paid_D
        # a draw in which the baseline gains nothing has no target
        return np.where(final_D > base, ratio_D, np.nan), np.isnan(ours_D), paid_D

    num_ours, num_theirs = len(arm.records), len(baseline.records)
    (ratio,), (missed,), (paid,) = ratios(even_shares(num_ours), even_shares(num_theirs))
    goal = target(base, float(baseline.finals_S.mean()), quota)
    alone_S = first_reached(x_M, y_SM, np.full(num_ours, goal))
    low = high = reached_draws = None
    low_missed = False
    if arm is not baseline and min(num_ours, num_theirs) > 1:
        random = np.random.default_rng(0)
        ratio_D, missed_D, _ = ratios(
            drawn_shares(random, draws, num_ours), drawn_shares(random, draws, num_theirs)
        )
        known_D = ~np.isnan(ratio_D)
        order_D = ratio_D[known_D].argsort(kind="stable")
        sorted_D, sorted_missed_D = ratio_D[known_D][order_D], missed_D[known_D][order_D]
        first, last = (min(int(q * len(sorted_D)), len(sorted_D) - 1) for q in (0.025, 0.975))
        low, high = float(sorted_D[first]), float(sorted_D[last])
        # a missed draw could lie anywhere below: with so many, the limit could, too
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


def even_shares(num_seeds: int) -> np.ndarray:
    """Each seed once: the plain mean, as a single draw."""
    return np.full((1, num_seeds), 1 / num_seeds)


def drawn_shares(random: np.random.Generator, draws: int, num_seeds: int) -> np.ndarray:
    """Seeds drawn with replacement, as many as there are: each one's share in each draw's mean."""
    drawn_DS = random.integers(num_seeds, size=(draws, num_seeds))
    return np.stack([(drawn_DS == s).mean(axis=1) for s in range(num_seeds)], axis=1)


def area(x_M: np.ndarray, y_M: np.ndarray, budget: float) -> float:
    """Mean of a curve over [0, budget]; behind its end it keeps its last value."""
    inner = x_M[(x_M > 0) & (x_M < budget)]
    x = np.concatenate([[0.0], inner, [budget]])
    y = np.interp(x, x_M, y_M)
    return float(np.sum((y[1:] + y[:-1]) / 2 * np.diff(x)) / budget)


def estimate(values_S: np.ndarray) -> Estimate:
    """Mean and 95 % t-interval."""
    count, mean = len(values_S), float(np.mean(values_S))
    if count < 2:
        return Estimate(mean, None, None, count)
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values_S, ddof=1) / np.sqrt(count))
    return Estimate(mean, mean - half, mean + half, count)


def paired(
    seeds: Sequence[int], values_S: np.ndarray, other_seeds: Sequence[int], others_S: np.ndarray
) -> Estimate | None:
    """Differences seed by seed, over the seeds that both have; none if there is no such seed."""
    other = dict(zip(other_seeds, others_S, strict=True))
    both = [v - other[s] for s, v in zip(seeds, values_S, strict=True) if s in other]
    return estimate(np.array(both)) if both else None


def mean_and_band(
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """For a figure: grid, mean over seeds, and half the width of its pointwise 95 % t-interval."""
    x_M, y_SM = on_common_grid(curves)
    count = len(curves)
    if count < 2:
        return x_M, y_SM.mean(axis=0), None
    half_M = stats.t.ppf(0.975, count - 1) * y_SM.std(axis=0, ddof=1) / np.sqrt(count)
    return x_M, y_SM.mean(axis=0), half_M
