"""Savings and intervals against curves whose answers are known."""

import math

import numpy as np
import pytest
from rounding import approx
from scipy import stats

from megatron_prepo.compare import analysis as comparison
from tests.made_records import lifelike, line


def only(records, arm="prepo"):
    (result,) = [r for r in comparison.analyse(records) if r.arm.name == arm]
    return result


def lines(arm, *seeds, **options):
    return [line(arm, seed, **options) for seed in seeds]


@pytest.mark.parametrize("quota", comparison.QUOTAS)
@pytest.mark.parametrize("axis", comparison.AXES)
def test_twice_as_fast_saves_exactly_two(axis, quota):
    """Both lines keep rising, so smoothing and interpolation must leave them as they are."""
    slow, fast = lines("random", 1, 2), lines("prepo", 1, 2, speed=2, final=0.6)
    for record in fast:  # without the corner at its top, which any smoothing would round
        for e in record["evaluations"]:
            e["pass_rate"] = 0.4 + 2 * 0.2 * e["rollouts"] / 1000
    saving = only(slow + fast).savings[axis, quota]
    assert saving.ratio == approx(2.0)
    assert (saving.low, saving.high) == (approx(2.0), approx(2.0))
    assert not saving.missed and saving.reached_draws == 1 and saving.reached_seeds == 2
    scale = {"rollouts": 1.0, "tokens": 20.0, "seconds": 0.1}[axis]
    assert saving.paid == approx(quota * 500 * scale)


def test_tokens_are_counted_for_themselves():
    """The arm is as fast by rollouts, but with half the tokens in each."""
    result = only(lines("random", 1) + lines("prepo", 1, tokens_per_rollout=10))
    assert result.savings["rollouts", 0.75].ratio == approx(1)
    assert result.savings["tokens", 0.75].ratio == approx(2)


def test_the_baseline_saves_nothing_and_reaches_its_own_target():
    result = only(lines("random", 1, 2) + lines("prepo", 1), arm="random")
    for quota in comparison.QUOTAS:
        saving = result.savings["rollouts", quota]
        assert saving.ratio == approx(1) and saving.low is None and not saving.missed
    assert result.final_difference is None


@pytest.mark.parametrize(("quota", "missed"), [(0.5, False), (0.75, True), (1.0, True)])
def test_a_miss_is_a_bound(quota, missed):
    """The arm is half as fast: at the end of its budget it is halfway."""
    saving = only(lines("random", 1, 2) + lines("prepo", 1, 2, speed=0.5)).savings[
        "rollouts", quota
    ]
    assert saving.missed is missed and saving.paid == approx(1000)
    assert saving.ratio == approx(quota * 1000 / 1000)
    assert saving.reached_seeds == (0 if missed else 2)
    assert saving.low_missed is missed and saving.reached_draws == (0 if missed else 1)


def test_some_seeds_miss():
    """One of three seeds stays at the base; the mean reaches 50 %, that seed does not."""
    records = lines("random", 1, 2, 3) + lines("prepo", 1, 2) + lines("prepo", 3, speed=0)
    saving = only(records).savings["rollouts", 0.5]
    assert saving.reached_seeds == 2 and not saving.missed
    assert saving.ratio == approx(500 / 750)  # the mean rises at two thirds of the speed
    # the mean of a draw reaches half of the way with at most one bad seed in it
    expected = (2 / 3) ** 3 + 3 * (2 / 3) ** 2 / 3
    assert saving.reached_draws == pytest.approx(expected, abs=0.04)
    assert saving.low_missed and saving.low == approx(0.5) and saving.high == 1.0


def test_the_first_crossing_counts_even_if_it_falls_again():
    x, y = np.array([0.0, 1, 2, 3]), np.array([[0.0, 2, 0, 4]])
    assert comparison.first_reached(x, y, np.array([1.0])) == 0.5
    assert comparison.first_reached(x, y, np.array([3.0])) == 2.75
    assert comparison.first_reached(x, y, np.array([0.0])) == 0
    assert np.isnan(comparison.first_reached(x, y, np.array([5.0])))


def test_smoothing_by_hand():
    record = line("random", 1, budget=3, points=4)
    for e, rate in zip(record["evaluations"], [0.4, 0.7, 0.1, 0.6], strict=True):
        e["pass_rate"] = rate
    x, y = comparison.curve(record, "rollouts")
    # weights 4, 1, 1, 4
    assert x == approx([0, (0 * 4 + 1 + 2) / 6, (1 + 2 + 3 * 4) / 6, 3])
    assert y == approx([0.4, (1.6 + 0.7 + 0.1) / 6, (0.7 + 0.1 + 2.4) / 6, 0.6])


def test_a_run_with_two_evaluations_is_a_line():
    x, y = comparison.curve(line("random", 1, points=2), "rollouts")
    assert x.tolist() == [0, 1000] and y == approx([0.4, 0.6])


def test_probes_are_not_counted():
    records = lines("random", 1) + lines("oracle", 1)
    for e in records[1]["evaluations"]:
        e["probes"], e["probe_tokens"], e["probe_seconds"] = 9 * e["rollouts"], e["tokens"], 0.0
        e["rollouts"], e["tokens"] = 10 * e["rollouts"], 2 * e["tokens"]
    result = only(records, "oracle")
    for axis in comparison.AXES:
        assert result.savings[axis, 0.5].ratio == approx(1)


def test_finals_and_areas_with_their_intervals():
    records = [line("random", s, final=f) for s, f in ((1, 0.60), (2, 0.62))]
    records += [line("prepo", s, final=f) for s, f in ((1, 0.63), (2, 0.65), (3, 0.70))]
    result = only(records)
    values = np.array([0.63, 0.65, 0.70])
    half = stats.t.ppf(0.975, df=2) * values.std(ddof=1) / math.sqrt(3)
    assert result.final.value == approx(values.mean())
    assert result.final.high - result.final.value == approx(half)
    difference = result.final_difference
    assert difference.value == approx(0.03) and difference.num_seeds == 2
    assert difference.high - difference.low == approx(0), "paired by seed"
    assert result.mean_pass.value == approx((0.4 + values.mean()) / 2)


def test_a_single_seed_has_no_interval():
    result = only(lines("random", 1, 2) + lines("prepo", 1, speed=0.9))
    saving = result.savings["rollouts", 0.5]
    assert saving.low is saving.high is saving.reached_draws is None
    assert result.final.low is None and result.final_difference.low is None


def test_without_a_baseline_or_its_gain_there_are_no_savings():
    assert only(lines("prepo", 1, 2)).savings == {}
    assert only(lines("random", 1, final=0.3) + lines("prepo", 1)).savings == {}
    assert only(lines("prepo", 1) + lines("random", 2)).final_difference is None


def test_area_by_hand():
    x, y = np.array([0.0, 10.0]), np.array([0.0, 1.0])
    assert comparison.area(x, y, 10) == approx(0.5)
    assert comparison.area(x, y, 5) == approx(0.25)
    assert comparison.area(x, y, 20) == approx(0.75), "it keeps its last value"


def test_the_same_records_give_the_same_intervals():
    records = [lifelike(arm, seed) for arm in ("random", "prepo") for seed in (1, 2, 3)]
    assert only(records).savings == only(records).savings


def test_the_interval_covers_the_truth():
    """Arms that learn at the true ratio 1.5, with noise over seeds: 9 in 10 intervals hold it.

    The percentile bootstrap over few seeds is too narrow, so 95 % are not to be had from 8.
    """
    covered, trials = 0, 100
    random = np.random.default_rng(1)
    for _ in range(trials):
        arms = {}
        for arm, speed in (("random", 0.5), ("prepo", 0.75)):
            records = [
                line(arm, s, speed=speed * (1 + random.normal(0, 0.1)), final=0.8) for s in range(8)
            ]
            (arms[arm],) = comparison.group_by_arm(records).values()
        saving = comparison.saving(arms["prepo"], arms["random"], "rollouts", 0.5, 0.4, draws=400)
        covered += saving.low <= 1.5 <= saving.high
    assert 0.85 <= covered / trials <= 0.99


def test_no_difference_is_found_where_there_is_none():
    records = [lifelike("random", seed) for seed in range(8)]
    for record in [lifelike("random", seed + 100) for seed in range(8)]:
        records.append({**record, "arm": "copy", "seed": record["seed"] - 100})
    saving = only(records, "copy").savings["rollouts", 0.5]
    assert saving.low < 1 < saving.high
