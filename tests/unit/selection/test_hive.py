"""HIVE: GRESO's history, then the band of prompt entropies; what fills up, and in which order."""

import math

import numpy as np
import pytest
import torch
from rounding import approx

from megatron_prepo.selection.base import Candidates
from megatron_prepo.selection.hive import in_band
from tests.unit.selection.selectors import passes, prompts, run_step, selector


def scored(entropy_P):
    """Return candidates with these prompt entropies."""
    entropy_P = torch.as_tensor(entropy_P, dtype=torch.float64)
    return Candidates(prompts(len(entropy_P)), entropy_P.exp(), entropy_P)


def generated(chooser, candidates, step=0, right=2):
    """Return the positions generated in a step where each group has this many passes of 4."""
    rounds = run_step(chooser, candidates, step, lambda c: passes(*[right] * len(c)))
    return [i for chosen in rounds for i in chosen]


@pytest.mark.parametrize(
    ("entropy", "band", "kept"),
    [
        ([1, 2, 3, 4], (0.5, 1), [0, 0, 1, 1]),  # the median is 2.5
        ([4, 1, 3, 2, 5], (0.5, 1), [1, 0, 1, 0, 1]),  # it is 3, and kept
        ([2, 2, 2, 2], (0.5, 1), [1, 1, 1, 1]),  # ties are kept together
        ([1, 2, 2, 3], (0.5, 1), [0, 1, 1, 1]),
        ([1, 2, 3, 4, 5], (0.25, 0.75), [0, 1, 1, 1, 0]),
        ([1, 2, 3, 4, 5], (0, 1), [1] * 5),
        ([1, math.nan, 3, math.inf, 4], (0.5, 1), [0, 0, 1, 0, 1]),  # of 1, 3, 4
        ([math.nan, math.nan], (0.5, 1), [0, 0]),
        ([7], (0.5, 1), [1]),
        ([], (0.5, 1), []),
    ],
)
def test_the_band(entropy, band, kept):
    assert in_band(np.array(entropy, dtype=float), *band).tolist() == [bool(k) for k in kept]


def test_with_empty_histories_the_upper_half_is_generated():
    """All 8 are accepted; the 4 of the largest entropy are offered, in a random order."""
    chooser = selector("hive", candidates=8, selected=4)
    candidates = scored([5, 1, 6, 2, 7, 3, 8, 4])
    assert sorted(generated(chooser, candidates)) == [0, 2, 4, 6]
    assert chooser.metrics() == {
        "selection/p_easy": 0.51,
        "selection/p_hard": 0.51,
        "selection/skipped": 0,
        "selection/outside_band": 4,
    }
    others = [selector("hive", candidates=8, selected=4, seed=seed) for seed in range(9)]
    assert len({tuple(generated(other, candidates)) for other in others}) > 3


def test_the_median_is_that_of_the_accepted_prompts():
    """Prompts 4 to 7 were all wrong 20 times in a row, with p = 0.05 and so at 0.01: skipped.

    Of the others, with entropies 1 to 4, those above 2.5 are generated first.
    """
    chooser = selector("hive", candidates=8, selected=2)
    chooser.p["hard"] = 0.05
    chooser.z["hard"] = {f"p{i}": 20 for i in range(4, 8)}
    assert chooser.acceptance("p4") == 0.01 and chooser.acceptance("p0") == 1
    assert sorted(generated(chooser, scored([1, 2, 3, 4, 50, 60, 70, 80]))) == [2, 3]
    assert chooser.metrics()["selection/skipped"] == 4


def test_where_the_band_has_too_few_prompts_the_rest_fill_up():
    """K = 3 of 4: two above the median, one of the accepted below it; K = P: all."""
    few = generated(selector("hive", candidates=4, selected=3), scored([1, 2, 3, 4]))
    assert {2, 3} < set(few) and len(few) == 3
    everything = generated(selector("hive", candidates=4, selected=4), scored([1, 2, 3, 4]))
    assert sorted(everything) == [0, 1, 2, 3]
    unscored = generated(selector("hive", candidates=4, selected=2), scored([math.nan] * 4))
    assert len(unscored) == 2


@pytest.mark.parametrize("right", [0, 4])
def test_groups_all_solved_or_none_use_up_the_band_and_lower_p(right):
    """The refills end with the band, and half as many groups are missing as in GRESO."""
    chooser = selector("hive", candidates=8, selected=2)
    assert sorted(generated(chooser, scored([1, 2, 3, 4, 5, 6, 7, 8]), right=right)) == [4, 5, 6, 7]
    moved = {"easy": 0.49, "hard": 0.51} if right else {"easy": 0.51, "hard": 0.49}
    assert chooser.p == approx(moved)
    again = generated(chooser, scored([1, 2, 3, 4, 5, 6, 7, 8]), step=1, right=right)
    assert len(set(again)) == len(again) >= 2


def test_the_first_round_has_half_as_many_again():
    chooser = selector("hive", candidates=20, selected=4)
    assert len(chooser.choose(scored(np.arange(20.0)), 0)) == 6
    assert chooser.needs_scores and chooser.refills


def test_the_full_band_is_greso():
    """Without a gate, and with floors out of reach, both choose alike in every step."""
    sizes = {"candidates": 12, "selected": 3, "hive_band": (0.0, 1.0)}
    hive, greso = (selector(method, **sizes) for method in ("hive", "greso"))
    for step in range(10):

        def reward(chosen, step=step):
            return passes(*((step + i % 3) % 5 for i in chosen))

        rounds = [run_step(c, scored(np.arange(12.0)), step, reward) for c in (hive, greso)]
        assert rounds[0] == rounds[1]
    assert hive.state_dict() == greso.state_dict()
