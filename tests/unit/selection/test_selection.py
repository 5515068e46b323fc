"""The perplexity window and its baseline, exhaustively for small sizes; what all methods keep."""

import json
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch

from megatron_prepo.config import SelectionConfig
from megatron_prepo.prepo.ppl_schedule import progress, select_window, window_start
from megatron_prepo.selection import METHODS
from megatron_prepo.selection.base import Candidates, Selector
from tests.unit.selection.selectors import passes, prompts, run_step, selector


def ppl(num, seed=0):
    return 1 + 20 * torch.rand(num, generator=torch.Generator().manual_seed(seed)).double()


def candidates(ppl_P):
    return Candidates(prompts(len(ppl_P)), ppl_P)


def window(method="prepo", step=0, ppl_P=None, **settings):
    """Return the window's first position at a step."""
    chooser = selector(method, **settings)
    chooser.choose(candidates(ppl(10) if ppl_P is None else ppl_P), step)
    return chooser.metrics()["selection/window_first"]


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
    """Easiest first; all unselected prompts on one side are easier, on the other harder."""
    for num_candidates, num_selected in SIZES:
        ppl_P = ppl(num_candidates)
        chooser = selector(candidates=num_candidates, selected=num_selected, total_steps=10)
        chosen = chooser.choose(candidates(ppl_P), step)
        first = chooser.metrics()["selection/window_first"]
        assert len(set(chosen)) == len(chosen) == num_selected
        rank_P = ppl_P.argsort().argsort()
        assert rank_P[chosen].tolist() == list(range(first, first + num_selected))


def test_first_and_last_step_of_a_run():
    """The lowest K perplexities, and the highest."""
    chooser, ppl_P = selector(total_steps=5), ppl(10)
    first, last = (sorted(chooser.choose(candidates(ppl_P), step)) for step in (0, 4))
    assert first == sorted(ppl_P.topk(2, largest=False).indices.tolist())
    assert last == sorted(ppl_P.topk(2).indices.tolist())


@pytest.mark.parametrize("step", range(5))
def test_as_many_selected_as_candidates_is_all_of_them_sorted(step):
    ppl_P = ppl(6)
    chosen = selector(candidates=6, selected=6).choose(candidates(ppl_P), step)
    assert chosen == ppl_P.argsort().tolist()


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
    chosen = selector().choose(candidates(ppl_P), 2)
    shuffled = selector().choose(candidates(ppl_P[shuffle]), 2)
    assert [shuffle[i].item() for i in shuffled] == chosen


def test_rho_max_stops_the_window_early():
    """The last step of 5 at rho_max = 1/2 is where a full schedule is halfway."""
    half = [window(rho_max=0.5, step=step) for step in range(5)]
    assert half == [0, 1, 2, 3, 4]
    assert progress(4, 5, 0.7) == Fraction(7, 10)
    assert window(rho_max=0.0, step=4) == 0


def test_horizon_sets_the_pace_and_the_window_then_stays():
    starts = [window(horizon=3, total_steps=6, step=step) for step in range(6)]
    assert starts == [0, 4, 8, 8, 8, 8]
    assert window(horizon=9, total_steps=5, step=4) == 4


def test_a_run_of_one_step_takes_the_easiest():
    assert window(total_steps=1) == 0


def test_random_choice_needs_no_perplexity_and_has_no_window():
    choice = selector("random")
    assert not choice.needs_scores and selector("prepo").needs_scores
    chosen = choice.choose(Candidates(prompts(10)), 3)
    assert choice.metrics() == {} and len(set(chosen)) == 2 and set(chosen) <= set(range(10))


def test_random_choice_follows_from_seed_and_step_alone():
    draws = [selector("random").choose(Candidates(prompts(10)), step) for step in range(50)]
    again = selector("random")
    assert [again.choose(candidates(ppl(10)), step) for step in reversed(range(50))] == draws[::-1]
    assert draws != [
        selector("random", seed=2).choose(Candidates(prompts(10)), step) for step in range(50)
    ]
    assert len({tuple(draw) for draw in draws}) > 25


def test_random_choice_is_uniform():
    """Each of 10 candidates in 2 of 10 draws: 400 +- 18 (one sigma) of 2000; a seeded draw."""
    choice, pool = selector("random"), Candidates(prompts(10))
    counts = Counter(i for step in range(2000) for i in choice.choose(pool, step))
    assert sorted(counts) == list(range(10))
    assert all(abs(count - 400) < 4 * 18 for count in counts.values())


def test_pacings_keep_the_ends_and_bend_the_middle():
    """Positions at rho = 1/2 of 8 are 4, 2 (a quarter) and 5 (0.707 of 8 is 5.66)."""
    for pacing, middle in {"linear": 4, "quadratic": 2, "root": 5}.items():
        places = [window(pacing=pacing, step=step) for step in range(5)]
        assert (places[0], places[2], places[4]) == (0, middle, 8)
        assert places == sorted(places)


def test_the_other_way_round():
    """The window moves from the highest perplexities to the lowest; the order within it stays."""
    places = [window(direction="high-to-low", step=step) for step in range(5)]
    assert places == [8, 6, 4, 2, 0]
    ppl_P = ppl(10)
    chosen = selector(direction="high-to-low").choose(candidates(ppl_P), 0)
    assert chosen == ppl_P.argsort()[-2:].tolist()


def test_the_oracle_takes_what_is_nearest_to_one_half():
    """Distances 0.5, 0.25, 0, 0.25, 0.5: the middle one, then the first of the two next to it."""
    oracle = selector("oracle")
    pass_rate_P = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double()
    known = Candidates(prompts(5), ppl(5), ppl(5), pass_rate_P)
    assert oracle.needs_pass_rates and oracle.choose(known, 0) == [2, 1]
    assert selector("oracle", target_pass_rate=1.0).choose(known, 0) == [4, 3]


# All methods


def test_a_method_writes_only_what_differs():
    """A method defines its constructor and `choose`; everything else is inherited from the protocol
    and does nothing."""

    class Last(Selector):
        def __init__(self, config, **_):
            self.num_selected = config.num_selected

        def choose(self, candidates, step):
            return list(range(len(candidates.prompts)))[-self.num_selected :]

    last = Last(SelectionConfig(num_candidates=10, num_selected=2), total_steps=1, seed=1)
    assert run_step(last, candidates(ppl(10)), 0, lambda chosen: passes(1, 2)) == [[8, 9]]
    assert (last.needs_scores, last.needs_pass_rates, last.refills) == (False, False, False)
    assert not last.shares_budget and last.group_sizes(prompts(2), 8) == [8, 8]
    last.load_state_dict(last.state_dict())
    assert last.metrics() == last.state_dict() == {}


def test_a_method_that_chooses_nothing_cannot_be_made():
    class Undecided(Selector):
        def __init__(self):
            pass

    with pytest.raises(TypeError, match="choose"):
        Undecided()


def look_at(step: int, num: int = 10) -> Candidates:
    """Return every third of 30 prompts, with all that a method may use; it varies with the step."""
    pool = prompts(30)[step % 3 :: 3]
    return Candidates(pool, ppl(num, step), ppl(num, 100 + step), ppl(num, 200 + step) / 21)


def steps(chooser, numbers) -> list:
    """Return a method's choices and metrics; rewards are random, and the same every time."""

    def reward(step, chosen):
        draw = random.Random(f"{step}/{chosen}")
        return passes(*(draw.choice([0, 0, 1, 2, 4]) for _ in chosen))

    return [
        (run_step(chooser, look_at(n), n, lambda chosen, n=n: reward(n, chosen)), chooser.metrics())
        for n in numbers
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_restored_method_goes_on_as_if_nothing_had_happened(method):
    """The state is saved through JSON after 7 of 20 steps, in the middle of an epoch of 3 steps; it
    does not change as the original run continues."""
    chooser, restored = (selector(method, selected=3, total_steps=20) for _ in range(2))
    before = steps(chooser, range(7))
    saved = chooser.state_dict()
    text = json.dumps(saved)
    after = steps(chooser, range(7, 20))
    assert json.dumps(saved) == text
    steps(restored, range(3))
    restored.load_state_dict(json.loads(text))
    assert steps(restored, range(7, 20)) == after
    assert json.dumps(restored.state_dict()) == json.dumps(chooser.state_dict())
    assert steps(selector(method, selected=3, total_steps=20), range(20)) == before + after


@pytest.mark.parametrize("method", METHODS)
def test_a_step_pays_for_k_candidates_or_more_and_for_none_twice(method):
    """Except that a method that shares the rollouts may choose a prompt again."""
    chooser = selector(method, selected=3, total_steps=20)
    for rounds, metrics in steps(chooser, range(20)):
        paid = [i for chosen in rounds for i in chosen]
        assert len(set(paid)) >= 3 and set(paid) <= set(range(10))
        assert len(set(paid)) == len(paid) or chooser.shares_budget
        assert all(name.startswith("selection/") for name in metrics)
        assert json.loads(json.dumps(metrics)) == metrics


@pytest.mark.parametrize(
    "method",
    ["random", "greso", "dapo", "mopps", "mapp", "hive", "vip", "pilot_commit", "foresight"],
)
def test_another_seed_is_another_choice(method):
    chosen = [steps(selector(method, selected=3, seed=seed), range(5)) for seed in (1, 2)]
    assert chosen[0] != chosen[1]
