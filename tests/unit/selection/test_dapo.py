"""Dynamic sampling: rounds of K until K groups have an advantage, or no candidate remains."""

import pytest
import torch

from megatron_prepo.selection.base import Candidates
from megatron_prepo.trainer.groups import Groups
from tests.unit.selection.selectors import grades, passes, prompts, run_step, selector


def pool(num):
    return Candidates(prompts(num))


def test_a_step_by_hand():
    """Six candidates in their order a b c d e f, K = 2, G = 4.

    | round | rolled out | right | with an advantage | missing |
    |---|---|---|---|---|
    | 1 | a b | 0, 3 | b | 1 |
    | 2 | c d | 4, 1 | d | 0 |

    Then nothing; the step trains on b and d, and e and f are never generated.
    """
    chooser, right = selector("dapo", candidates=6), iter([passes(0, 3), passes(4, 1)])
    paid = Groups()

    def reward(chosen):
        nonlocal paid
        rewards_KG = next(right)
        paid = paid.extend(
            chosen, [f"{i}/{g}" for i in chosen for g in range(4)], grades(rewards_KG)
        )
        return rewards_KG

    first, second = run_step(chooser, pool(6), 0, reward)
    assert (len(first), len(second), len({*first, *second})) == (2, 2, 4)
    assert chooser.metrics() == {"selection/rounds": 2}
    trained = paid.select_for_training(2)
    assert trained.chosen == (first[1], second[1])
    assert trained.rollouts == tuple(f"{i}/{g}" for i in trained.chosen for g in range(4))
    assert trained.rewards.equal(passes(3, 1))


def test_the_first_round_is_what_random_chooses():
    for num, selected in [(6, 2), (160, 32), (30, 30)]:
        sizes = {"candidates": num, "selected": selected}
        for step in range(5):
            first = selector("dapo", **sizes).choose(pool(num), step)
            assert first == selector("random", **sizes).choose(pool(num), step)


@pytest.mark.parametrize("right", [0, 4])
def test_a_step_without_any_advantage_ends_when_all_are_paid(right):
    """7 candidates, K = 3: rounds of 3, 3 and 1, each candidate once; three groups are trained."""
    chooser, paid = selector("dapo", candidates=7, selected=3), Groups()

    def reward(chosen):
        nonlocal paid
        rewards_KG = passes(*[right] * len(chosen))
        paid = paid.extend(chosen, [None] * rewards_KG.numel(), grades(rewards_KG))
        return rewards_KG

    rounds = run_step(chooser, pool(7), 0, reward)
    assert [len(r) for r in rounds] == [3, 3, 1]
    assert sorted(i for r in rounds for i in r) == list(range(7))
    assert paid.select_for_training(3).chosen == tuple(rounds[0])


def test_a_step_with_enough_advantages_has_one_round():
    chooser = selector("dapo")
    rounds = run_step(chooser, pool(10), 0, lambda chosen: passes(1, 2))
    assert len(rounds) == 1 and chooser.metrics() == {"selection/rounds": 1}


def test_what_the_last_round_has_too_much_is_dropped():
    """1 + 2 useful groups for K = 2: the first two are trained."""
    paid = Groups().extend((0, 1), (None,) * 8, grades(passes(0, 1)))
    paid = paid.extend((2, 3), (None,) * 8, grades(passes(2, 3)))
    assert paid.select_for_training(2).chosen == (1, 2)


def test_each_step_starts_anew():
    """A step after one that generated all candidates has all of them, and all K groups missing."""
    chooser = selector("dapo", candidates=5)
    for step in range(3):
        rounds = run_step(chooser, pool(5), step, lambda chosen: passes(*[0] * len(chosen)))
        assert [len(r) for r in rounds] == [2, 2, 1]
        assert rounds[0] == selector("random", candidates=5).choose(pool(5), step)


def test_an_advantage_is_any_difference_of_rewards():
    """All 0.1 is none, whatever its rounding; one right of 16 is one."""
    chooser = selector("dapo", selected=1)
    chooser.choose(pool(10), 0)
    chooser.observe(prompts(1), torch.full((1, 16), 0.1))
    assert chooser.choose(pool(10), 0)
    chooser.observe(prompts(1), passes(1, group_size=16))
    assert not chooser.choose(pool(10), 0)


def test_a_later_round_is_any_of_the_rest_with_equal_chance():
    """Rounds 2 of 2 of the 8 candidates left: each of 10 in 400 +- 18 (one sigma) of 2000."""
    counts, chooser = [0] * 10, selector("dapo")
    for step in range(2000):
        chooser.choose(pool(10), step)
        for i in chooser.choose(pool(10), step):
            counts[i] += 1
    assert all(abs(count - 400) < 4 * 18 for count in counts)
