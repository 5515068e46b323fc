"""Pilot-Commit: which prompts get more than a pilot, and how much of K*G is left for them."""

import json

import pytest
import torch

from megatron_prepo.selection.base import Candidates
from tests.unit.selection.selectors import prompts, selector

K = 4


class Step:
    """A step of K = 4 prompts of 12, G = 8, in which prompt i passes `passing[i]` times first."""

    def __init__(self, chooser, passing: dict[int, int], step=0, group_size=8):
        pool, given = Candidates(prompts(12)), dict.fromkeys(range(12), 0)
        self.rounds: list[dict[int, int]] = []
        while chosen := chooser.choose(pool, step):
            named = pool.at(chosen)
            sizes = chooser.group_sizes(named, group_size)
            self.rounds.append(dict(zip(chosen, sizes, strict=True)))
            rows = []
            for position, size in self.rounds[-1].items():
                passes = max(0, min(size, passing.get(position, 0) - given[position]))
                rows.append(torch.tensor([1.0] * passes + [0.0] * (size - passes)))
                given[position] += size
            chooser.observe(named, tuple(rows))
        self.total = sum(given.values())


def pilot(**settings):
    return selector("pilot_commit", candidates=12, selected=K, total_steps=9, **settings)


def order() -> list[int]:
    """Return the candidates in the order of their pilots, in step 0."""
    chooser = pilot()
    return [p for round_ in Step(chooser, {}).rounds for p in round_]


def test_where_all_pass_each_prompt_has_a_group_of_g():
    """One round of pilots, and 6 more for each of the four: the choice of `random`."""
    step = Step(pilot(), dict.fromkeys(range(12), 1))
    first = selector("random", candidates=12, selected=K).choose(Candidates(prompts(12)), 0)
    assert step.rounds == [dict.fromkeys(first, 2), dict.fromkeys(first, 6)]


def test_further_pilots_replace_those_that_do_not_pass():
    """Two of four pass, and can use 12 of the remaining 24 rollouts: two more pilots, of which one
    passes. Three can use 18 of the remaining 20: one more, which does not pass, and 6 for each."""
    first = order()
    chooser = pilot()
    step = Step(chooser, {first[0]: 1, first[2]: 1, first[5]: 1})
    assert step.rounds == [
        dict.fromkeys(first[:4], 2),
        dict.fromkeys(first[4:6], 2),
        {first[6]: 2},
        dict.fromkeys((first[0], first[2], first[5]), 6),
    ]
    assert step.total == K * 8
    assert chooser.metrics() == {
        "selection/pilots": 7,
        "selection/committed": 3,
        "selection/evicted": 0,
        "selection/largest_group": 8,
    }


def test_what_cannot_be_divided_goes_to_the_first():
    """Four of four pass after two rounds of pilots of 3: 32 - 12 - 3 = 17 is 5 + 4 + 4 + 4."""
    first, chooser = order(), pilot(pilot_rollouts=3, pilot_band=(0.3, 0.7))
    step = Step(chooser, dict.fromkeys((first[0], first[1], first[2], first[4]), 1))
    assert [sorted(round_.values()) for round_ in step.rounds] == [[3] * 4, [3], [4, 4, 4, 5]]
    assert step.rounds[-1][first[0]] == 5 and step.total == K * 8


@pytest.mark.parametrize(("band", "passing"), [((0.25, 0.75), True), ((0.5, 0.75), False)])
def test_the_band_holds_its_bounds(band, passing):
    """1 of 4 is a rate of 0.25, and 3 of 4 of 0.75."""
    first, chooser = order(), pilot(pilot_rollouts=4, pilot_band=band)
    Step(chooser, {first[0]: 1, first[1]: 3, first[2]: 4})
    assert chooser.tried[first[0]] == 0.25 and chooser.tried[first[1]] == 0.75
    assert (first[0] in chooser.passing()) == passing
    assert first[1] in chooser.passing() and first[2] not in chooser.passing()


def test_without_any_that_passes_all_has_been_tried():
    """Pilots of all 12 candidates cost 24 of 32; the rest goes to the first K, or to those with an
    advantage outside the band."""
    first = order()
    step = Step(pilot(), {})
    assert sum(len(round_) for round_ in step.rounds[:-1]) == 12
    assert step.rounds[-1] == dict.fromkeys(first[:4], 2) and step.total == K * 8
    outside = Step(pilot(pilot_band=(0.9, 0.95)), {first[7]: 1})
    assert outside.rounds[-1] == {first[7]: 8} and outside.total == K * 8


@pytest.mark.parametrize("group_size", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("num_passing", [0, 1, 5, 12])
def test_each_step_generates_k_times_g(group_size, num_passing):
    passing = dict.fromkeys(range(num_passing), 1)
    step = Step(pilot(), passing, group_size=group_size)
    assert step.total == K * group_size
    assert all(size >= 1 for round_ in step.rounds for size in round_.values())


def test_too_easy_prompts_come_last_and_hard_ones_do_not():
    """A pilot with a failure ends the eviction."""
    chooser = pilot()
    Step(chooser, {0: 9, 1: 9, 2: 1})
    evicted = set(chooser.evicted)
    assert evicted <= {"p0", "p1"} and evicted
    for step in range(1, 5):
        assert not evicted & {
            f"p{i}" for i in Step(chooser, dict.fromkeys(range(2, 12), 1), step).rounds[0]
        }
    again = pilot()
    again.load_state_dict(json.loads(json.dumps(chooser.state_dict())))
    assert list(again.evicted) == list(chooser.evicted)
    for step in range(5, 9):
        Step(again, {}, step)
    assert again.evicted == {}


def test_nothing_is_evicted_above_one():
    chooser = pilot(pilot_evict=1.1)
    Step(chooser, dict.fromkeys(range(12), 9))
    assert chooser.evicted == {}


def test_a_step_that_is_begun_again_makes_the_same_rounds():
    first = order()
    passing = {first[1]: 1, first[4]: 1}
    chooser = pilot()
    saved = json.loads(json.dumps(chooser.state_dict()))
    whole = Step(chooser, passing).rounds
    again = pilot()
    again.load_state_dict(saved)
    assert Step(again, passing).rounds == whole
