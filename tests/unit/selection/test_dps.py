"""DPS: the Markov chain's forward filter against all sequences of states, and the choice."""

from itertools import product

import numpy as np
import pytest
import torch
from rounding import approx

from megatron_prepo.selection.base import Candidates
from megatron_prepo.selection.dps import PARTIAL, predicted, states, transition
from tests.unit.selection.selectors import passes, prompts, run_step, selector

G = 4
RIGHT = {0: 0, 1: 2, 2: G}
"""Passes of a group in each state."""


def visit(chooser, step, state):
    """Roll out prompt p0 in a step, with a group of this state."""
    chooser.choose(Candidates(prompts(2)), step)
    chooser.observe(prompts(1), passes(RIGHT[state], group_size=G))


def predict(chooser, step):
    """Return alpha and the predicted distribution of p0's state in a step."""
    chooser.step = step
    alpha_1SS, belief_1S = chooser.beliefs(prompts(1))
    return alpha_1SS[0], predicted(alpha_1SS, belief_1S)[0]


def enumerated(observations: dict[int, int], until: int, decay: float) -> tuple:
    """Filter by summing over all sequences of states between two visits, as in the paper.

    `observations`: state by step.  Returns alpha after step `until` and the prior of the next.
    """
    prior_SS = np.ones((3, 3))
    alpha_SS, last = prior_SS, None
    matrices = []  # one per step since the last visit
    for step in range(until + 1):
        phi_SS = alpha_SS / alpha_SS.sum(axis=0)
        matrices.append(phi_SS)
        start = np.full(3, 1 / 3) if last is None else np.eye(3)[last]
        count_SS = np.zeros((3, 3))
        if last is None:
            matrices = [phi_SS]  # before the first visit, each step begins uniformly
        if step in observations:
            seen = observations[step]
            for path in product(range(3), repeat=len(matrices) + 1):
                chance = start[path[0]]
                for j, i, matrix in zip(path[:-1], path[1:], matrices, strict=True):
                    chance *= matrix[i, j]
                count_SS[path[-1], path[-2]] += chance * (path[-1] == seen)
            count_SS /= count_SS.sum()
            last, matrices = seen, []
        alpha_SS = decay * alpha_SS + (1 - decay) * prior_SS + count_SS
    phi_SS = alpha_SS / alpha_SS.sum(axis=0)
    if last is None:
        return alpha_SS, phi_SS @ np.full(3, 1 / 3)
    prior_S = np.zeros(3)
    for path in product(range(3), repeat=len(matrices) + 2):
        chance = float(path[0] == last)
        for j, i, matrix in zip(path[:-1], path[1:], [*matrices, phi_SS], strict=True):
            chance *= matrix[i, j]
        prior_S[path[-1]] += chance
    return alpha_SS, prior_S


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "observations", [{}, {0: 1}, {2: 0}, {0: 0, 1: 1, 2: 2}, {0: 1, 3: 2, 5: 1}, {1: 2, 2: 2, 5: 0}]
)
def test_the_forward_filter_is_the_sum_over_all_sequences_of_states(observations, decay):
    """The pair of states at a visit is weighed by the paths that lead to it since the last one."""
    chooser = selector("dps", candidates=2, selected=1, dps_decay=decay)
    for step in range(7):
        if step in observations:
            visit(chooser, step, observations[step])
        alpha_SS, prior_S = predict(chooser, step + 1)
        expected_alpha_SS, expected_prior_S = enumerated(observations, step, decay)
        assert prior_S == approx(expected_prior_S, scale=1.0)
        assert prior_S.sum() == approx(1.0)
        assert alpha_SS == approx(expected_alpha_SS, scale=1.0)


def test_two_visits_by_hand():
    """Some pass, then all; lambda 1/2.  At first Phi is uniform, so row 1 of alpha gains 1/3 each:
    column 1 is (1, 4/3, 1) / (10/3).  The second visit is from state 1 for certain: alpha decays to
    halves of the excess, (1, 7/6, 1), and its element 21 gains 1."""
    chooser = selector("dps", candidates=2, selected=1)
    visit(chooser, 0, 1)
    assert predict(chooser, 1)[1] == approx(np.array([0.3, 0.4, 0.3]))
    visit(chooser, 1, 2)
    alpha_SS, prior_S = predict(chooser, 2)
    assert alpha_SS == approx(np.array([[1, 1, 1], [7 / 6] * 3, [1, 2, 1]]))
    assert prior_S == approx(np.array([6, 7, 6]) / 19)


def test_what_is_not_rolled_out_drifts_to_the_uniform_distribution():
    """This is how a prompt is revisited."""
    chooser = selector("dps", candidates=2, selected=1)
    for step in range(10):
        visit(chooser, step, 2)
    partial = [predict(chooser, step)[1][PARTIAL] for step in (10, 11, 12, 14, 80)]
    assert partial[0] < 0.25 and partial == sorted(partial)
    assert partial[-1] == approx(1 / 3)


def test_states_are_read_from_the_rewards():
    """A group whose rewards differ is partial, also if none or all are at the largest reward."""
    rewards_KG = torch.tensor([[0.0, 0, 0], [0.1, 0.1, 0.1], [0.0, 0.1, 0], [1.0, 0, 1], [1, 1, 1]])
    assert states(rewards_KG, 1.0).tolist() == [0, 0, 1, 1, 2]
    assert states(rewards_KG[:2], 0.1).tolist() == [0, 2]


def test_columns_of_the_transition_add_up_to_one():
    alpha_1SS = np.random.default_rng(0).uniform(0.1, 3, size=(1, 3, 3))
    assert transition(alpha_1SS).sum(axis=1) == approx(np.ones((1, 3)))
    belief_1S = np.array([[0.2, 0.5, 0.3]])
    assert predicted(alpha_1SS, belief_1S)[0] == approx(transition(alpha_1SS)[0] @ belief_1S[0])


def test_the_prompts_that_were_partly_solved_come_first():
    """States 0, 1, 2 of three seen prompts, and one unseen: 1, the unseen, then 0 and 2 alike."""
    chooser, pool = selector("dps", candidates=4, selected=4), Candidates(prompts(4))
    assert chooser.choose(pool, 0) == [0, 1, 2, 3]  # K = P, and nothing known
    chooser.observe(pool.prompts[:3], passes(0, 2, 4))
    assert chooser.choose(pool, 1) == [1, 3, 0, 2]
    mean = (0.4 + 1 / 3 + 2 * 0.3) / 4
    assert chooser.metrics() == {"selection/informative": approx(mean)}


@pytest.mark.parametrize("right", [0, 4])
def test_groups_all_solved_or_none_make_way_for_unseen_prompts(right):
    chooser, pool = selector("dps", candidates=6), Candidates(prompts(6))
    seen = []
    for step in range(3):
        [chosen] = run_step(chooser, pool, step, lambda c: passes(*[right] * len(c)))
        seen += chosen
    assert sorted(seen) == list(range(6))


def test_the_largest_gap_of_a_batch_does_not_matter_to_the_rest():
    """Prompts are carried over their own numbers of steps, whichever are offered with them."""
    chooser = selector("dps", candidates=3, selected=1)
    for step, name in ((0, "p0"), (4, "p1"), (5, "p2")):
        chooser.choose(Candidates(prompts(3)), step)
        chooser.observe([p for p in prompts(3) if p.id == name], passes(4))
    chooser.step = 9
    together = chooser.beliefs(prompts(3))
    for i, prompt in enumerate(prompts(3)):
        for one, all_of_them in zip(chooser.beliefs([prompt]), together, strict=True):
            assert one[0] == approx(all_of_them[i])
