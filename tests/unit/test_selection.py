"""The perplexity window and its baseline, exhaustively for small sizes."""

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch

from megatron_prepo.config import SelectionConfig
from megatron_prepo.selection import METHODS
from megatron_prepo.selection.prepo import progress, select_window, window_start


def selector(method="prepo", *, candidates=10, selected=2, total_steps=5, seed=1, **settings):
    config = SelectionConfig(
        method=method, num_candidates=candidates, num_selected=selected, **settings
    )
    return METHODS[method](config, total_steps=total_steps, seed=seed)


def ppl(num, seed=0):
    return 1 + 20 * torch.rand(num, generator=torch.Generator().manual_seed(seed)).double()


SIZES = [(p, k) for p in range(1, 13) for k in range(1, p + 1)]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 11, 100])
def test_window_travels_from_the_easiest_to_the_hardest(steps):
    """l(0) = 0, l(1) = |B| - K, never back, and at each step floor(step (|B| - K) / (T - 1))."""
    for num_candidates, num_selected in SIZES:
        room = num_candidates - num_selected
        starts = [
            window_start(progress(step, steps), num_candidates, num_selected)
            for step in range(steps)
        ]
        assert starts == [step * room // max(1, steps - 1) for step in range(steps)]
        assert starts[0] == 0
        assert starts == sorted(starts)
        assert steps == 1 or starts[-1] == room


def test_progress_is_a_fraction_because_floats_round_down():
    """29/100 of 100 positions is position 29; 0.29 * 100 in floating point is 28.999..."""
    assert int(0.29 * 100) == 28
    assert window_start(progress(29, 101), 105, 5) == 29


@pytest.mark.parametrize("step", [0, 3, 9])
def test_k_prompts_of_consecutive_ranks_are_selected(step):
    """Easiest first; all that are left out on one side are easier, on the other harder."""
    for num_candidates, num_selected in SIZES:
        ppl_P = ppl(num_candidates)
        chosen, first = selector(
            candidates=num_candidates, selected=num_selected, total_steps=10
        ).choose(ppl_P, step)
        assert len(set(chosen)) == len(chosen) == num_selected
        rank_P = ppl_P.argsort().argsort()
        assert rank_P[chosen].tolist() == list(range(first, first + num_selected))


def test_first_and_last_step_of_a_run():
    """The lowest K perplexities, and the highest."""
    window, ppl_P = selector(total_steps=5), ppl(10)
    assert sorted(window.choose(ppl_P, 0)[0]) == sorted(
        ppl_P.topk(2, largest=False).indices.tolist()
    )
    assert sorted(window.choose(ppl_P, 4)[0]) == sorted(ppl_P.topk(2).indices.tolist())


@pytest.mark.parametrize("step", range(5))
def test_as_many_selected_as_candidates_is_all_of_them_sorted(step):
    ppl_P = ppl(6)
    chosen, first = selector(candidates=6, selected=6).choose(ppl_P, step)
    assert (chosen, first) == (ppl_P.argsort().tolist(), 0)


def test_ties_keep_their_order():
    ppl_P = torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0, 1.0])
    assert select_window(ppl_P, 0, 6) == [1, 3, 5, 0, 2, 4]
    many_P = torch.ones(1000).double()
    assert select_window(many_P, 100, 800) == list(range(100, 900))


def test_what_is_not_finite_comes_last():
    """NaN and inf alike, in their order, after the largest finite number."""
    huge = torch.finfo(torch.float64).max
    ppl_P = torch.tensor([math.nan, 3.0, math.inf, huge, math.nan, 1.0], dtype=torch.float64)
    assert select_window(ppl_P, 0, 6) == [5, 1, 3, 0, 2, 4]


def test_order_of_the_candidates_does_not_matter():
    ppl_P = ppl(10)
    shuffle = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    chosen, _ = selector().choose(ppl_P, 2)
    shuffled, _ = selector().choose(ppl_P[shuffle], 2)
    assert [shuffle[i].item() for i in shuffled] == chosen


def test_rho_max_stops_the_window_early():
    """At 1/2, the last step of 5 stands where a full schedule is half-way."""
    half = [selector(rho_max=0.5).choose(ppl(10), step)[1] for step in range(5)]
    assert half == [0, 1, 2, 3, 4]
    assert progress(4, 5, 0.7) == Fraction(7, 10)
    assert selector(rho_max=0.0).choose(ppl(10), 4)[1] == 0


def test_horizon_sets_the_pace_and_the_window_then_stays():
    starts = [selector(horizon=3, total_steps=6).choose(ppl(10), step)[1] for step in range(6)]
    assert starts == [0, 4, 8, 8, 8, 8]
    assert selector(horizon=9, total_steps=5).choose(ppl(10), 4)[1] == 4


def test_a_run_of_one_step_takes_the_easiest():
    assert selector(total_steps=1).choose(ppl(10), 0)[1] == 0


def test_random_choice_needs_no_perplexity_and_has_no_window():
    choice = selector("random")
    assert not choice.needs_perplexity and selector("prepo").needs_perplexity
    chosen, first = choice.choose(None, 3)
    assert first is None and len(set(chosen)) == 2 and set(chosen) <= set(range(10))


def test_random_choice_follows_from_seed_and_step_alone():
    draws = [selector("random").choose(None, step)[0] for step in range(50)]
    again = selector("random")
    assert [again.choose(ppl(10), step)[0] for step in reversed(range(50))] == draws[::-1]
    assert draws != [selector("random", seed=2).choose(None, step)[0] for step in range(50)]
    assert len({tuple(draw) for draw in draws}) > 25


def test_random_choice_is_uniform():
    """Each of 10 candidates in 2 of 10 draws: 400 +- 18 (one sigma) of 2000; a seeded draw."""
    choice = selector("random")
    counts = Counter(i for step in range(2000) for i in choice.choose(None, step)[0])
    assert sorted(counts) == list(range(10))
    assert all(abs(count - 400) < 4 * 18 for count in counts.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_restored_selector_goes_on_as_the_first_would_have(method):
    first, restored = selector(method), selector(method)
    first.choose(ppl(10), 0)
    first.observe([], torch.zeros(2, 4))
    restored.load_state_dict(first.state_dict())
    for step in range(1, 5):
        assert first.choose(ppl(10), step) == restored.choose(ppl(10), step)
