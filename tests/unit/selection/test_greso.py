"""GRESO: how a prompt's history changes its probability, and how large a round is."""

import math
from collections import Counter

import pytest
import torch
from rounding import approx

from megatron_prepo.selection.base import Candidates
from megatron_prepo.selection.greso import round_size
from tests.unit.selection.selectors import passes, prompts, run_step, selector


def z(chooser, name="p0"):
    return tuple(chooser.z[kind].get(name, 0) for kind in ("easy", "hard"))


def test_z_counts_the_latest_visits_of_one_kind():
    """right of 4:  0       0       4       4       2       4       4       0
    (z_easy, z_hard): (0, 1)  (0, 2)  (1, 0)  (2, 0)  (0, 0)  (1, 0)  (2, 0)  (0, 1)
    """
    chooser, history = selector("greso"), []
    for right in (0, 0, 4, 4, 2, 4, 4, 0):
        chooser.observe(prompts(1), passes(right))
        history.append(z(chooser))
    assert history == [(0, 1), (0, 2), (1, 0), (2, 0), (0, 0), (1, 0), (2, 0), (0, 1)]


@pytest.mark.parametrize(
    ("rewards", "kind"),
    [
        ([0.1] * 16, (0, 1)),
        ([0.0] * 16, (0, 1)),
        ([1.0] * 16, (1, 0)),
        ([0.9] * 16, (0, 1)),
        ([1.0] + [0.0] * 15, (0, 0)),
        ([1.0] * 15 + [0.9999999], (0, 0)),
        ([0.1] * 15 + [0.0], (0, 0)),
    ],
)
def test_only_equal_rewards_are_zero_variance(rewards, kind):
    """Rewards decide, not their mean: 1 right of 16 is 0.06.  Easy means that all pass, at 1."""
    chooser = selector("greso")
    chooser.observe(prompts(1), torch.tensor([rewards]))
    assert z(chooser) == kind


def test_the_base_probabilities_over_four_steps_by_hand():
    """K = 4 of 6 new candidates: the first round has 6, and 4 useful ones end the step.

    | step | easy | hard | easy/6 >= 1/12 | hard/6 >= 1/6 | p_easy | p_hard |
    |---|---|---|---|---|---|---|
    | 0 | 1 | 1 | yes | yes | 0.49 | 0.49 |
    | 1 | 0 | 2 | no | yes | 0.50 | 0.48 |
    | 2 | 2 | 0 | yes | no | 0.49 | 0.49 |
    | 3 | 0 | 0 | no | no | 0.50 | 0.50 |
    """
    chooser = selector("greso", candidates=6, selected=4)
    right = [(4, 0, 1, 2, 3, 1), (1, 0, 2, 0, 1, 1), (4, 3, 3, 4, 1, 1), (1, 2, 3, 1, 2, 3)]
    ps = []
    for step, right_K in enumerate(right):
        candidates = Candidates(prompts(6, prefix=f"step {step} "))
        rounds = run_step(chooser, candidates, step, lambda _, right_K=right_K: passes(*right_K))
        assert [len(r) for r in rounds] == [6]
        ps += [chooser.metrics()["selection/p_easy"], chooser.metrics()["selection/p_hard"]]
    assert ps == approx([0.49, 0.49, 0.50, 0.48, 0.49, 0.49, 0.50, 0.50])


def test_the_base_probabilities_stay_between_5_and_95_percent():
    chooser = selector("greso")
    for step in range(60):
        run_step(chooser, Candidates(prompts(10)), step, lambda chosen: passes(*[0] * len(chosen)))
    assert chooser.p == {"easy": 0.95, "hard": 0.05}


@pytest.mark.parametrize(
    ("useful", "paid", "size"),
    [
        (0, 0, 384),  # the first round: 1.5 * 256
        (156, 384, 308),  # 100 missing, 156/384 useful: 1.25 * 100 / 0.40625 = 307.7
        (250, 400, 12),  # 6 missing, 5/8 useful: 1.25 * 6 / 0.625 = 12 exactly
        (255, 256, 2),  # 1 missing, nearly all useful: 1.255
        (56, 384, 384),  # 1714, cut
        (0, 384, 384),  # alpha = 1: no estimate
    ],
)
def test_round_sizes_as_published(useful, paid, size):
    assert round_size(256, useful, paid) == size


def test_rounds_of_a_step_by_hand():
    """K = 4 of 20.  Round 1: ceil(1.5 * 4) = 6, of which 3 are useful, so 1 is missing.
    Round 2: ceil(1.25 * 1 / (1 - 3/6)) = 3, none useful.  Round 3: ceil(1.25 / (3/9)) = 4, one is.
    """
    chooser = selector("greso", candidates=20, selected=4)
    right = iter([passes(1, 2, 3, 0, 0, 4), passes(0, 0, 4), passes(0, 2, 0, 0)])
    rounds = run_step(chooser, Candidates(prompts(20)), 0, lambda _: next(right))
    assert [len(r) for r in rounds] == [6, 3, 4]
    assert len({i for r in rounds for i in r}) == 13


def test_a_step_ends_when_all_candidates_are_paid():
    chooser = selector("greso", candidates=10, selected=4)
    rounds = run_step(
        chooser, Candidates(prompts(10)), 0, lambda chosen: passes(*[4] * len(chosen))
    )
    assert [len(r) for r in rounds] == [6, 4]


def test_skipped_prompts_fill_up_to_k_groups_and_no_further():
    """z = 60 and p_hard = 0.5: none is accepted; K = 4 are rolled out all the same."""
    chooser, pool = selector("greso", candidates=10, selected=4), prompts(10)
    for _ in range(60):
        chooser.observe(pool, passes(*[0] * 10))
    rounds = run_step(chooser, Candidates(pool), 0, lambda chosen: passes(*[0] * len(chosen)))
    assert [len(r) for r in rounds] == [4]
    assert chooser.metrics()["selection/skipped"] == 10


@pytest.mark.parametrize(("kind", "right", "p"), [("easy", 4, 0.8), ("hard", 0, 0.5)])
def test_chance_of_a_prompt_is_p_to_the_z(kind, right, p):
    """100 prompts of each z = 0, ..., 4 in 50 steps: of 5000 draws p^z are accepted, within four
    standard deviations of the binomial distribution; z = 0 always is.  Seeded.
    """
    chooser, pool = selector("greso", candidates=500, selected=1), prompts(500)
    chooser.p[kind] = p
    z_of = {prompt.id: i % 5 for i, prompt in enumerate(pool)}
    for visit in range(4):
        for prompt in pool:
            if z_of[prompt.id] > visit:
                chooser.observe([prompt], passes(right))
    accepted = Counter()
    for step in range(50):
        first = chooser.choose(Candidates(pool), step)
        accepted.update(z_of[pool[i].id] for i in first + chooser.waiting)
        assert chooser.skipped == 500 - len(first) - len(chooser.waiting)
    for length in range(5):
        chance = p**length
        sigma = math.sqrt(5000 * chance * (1 - chance))
        assert abs(accepted[length] - 5000 * chance) <= 4 * sigma


def test_candidates_without_history_have_equal_chances():
    """First rounds of ceil(1.5 * 2) = 3 of 10: each in 600 +- 20.5 (one sigma) of 2000."""
    chooser, pool = selector("greso"), Candidates(prompts(10))
    counts = Counter(i for step in range(2000) for i in chooser.choose(pool, step))
    assert sorted(counts) == list(range(10))
    assert all(abs(count - 600) < 4 * 20.5 for count in counts.values())
