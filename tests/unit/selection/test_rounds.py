"""Numbers of rollouts that a selector asks for, checked before anything is rolled out."""

import pytest

from megatron_prepo.errors import UserError
from megatron_prepo.selection.base import Candidates, Selector
from megatron_prepo.selection.rounds import rounds
from tests.unit.selection.selectors import prompts


class Script(Selector):
    """Asks for the rounds that it is given: positions, and the numbers of their rollouts."""

    def __init__(self, *script, refills=True, shares_budget=True):
        self.script, self.refills, self.shares_budget = list(script), refills, shares_budget

    def choose(self, candidates, step):
        self.sizes = self.script[0][1] if self.script else []
        return self.script.pop(0)[0] if self.script else []

    def group_sizes(self, prompts, group_size):
        return self.sizes


def asked(selector) -> list:
    """Return the rounds of a step of 8 candidates, K = 2 and G = 4."""
    sizes = {"num_selected": 2, "group_size": 4, "method": "mine"}
    found = rounds(selector, Candidates(prompts(8)), 3, **sizes)
    return [(c.positions, [p.id for p in c.prompts], c.samples) for c in found]


def test_a_later_round_continues_the_numbers_of_a_prompt():
    script = Script(([5, 1, 2], [1, 1, 1]), ([1, 7], [2, 1]), ([1], [2]))
    assert asked(script) == [
        ([5, 1, 2], ["p5", "p1", "p2"], [range(1)] * 3),
        ([1, 7], ["p1", "p7"], [range(1, 3), range(1)]),
        ([1], ["p1"], [range(3, 5)]),
    ]


def test_by_default_each_prompt_has_g_rollouts():
    class Default(Script):
        group_sizes = Selector.group_sizes

    for refills in (True, False):
        selector = Default(([4, 0], None), refills=refills, shares_budget=False)
        assert asked(selector) == [([4, 0], ["p4", "p0"], [range(4)] * 2)]


def test_a_method_that_shares_nothing_may_ask_for_any_number():
    selector = Script(([0, 1], [1, 9]), refills=False, shares_budget=False)
    assert [samples for *_, samples in asked(selector)] == [[range(1), range(9)]]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([([0, 1], [4, 5])], "group_sizes, in step 3, returned 9 rollouts in all; share .* = 8"),
        ([([0, 1], [4, 3])], "returned 7 rollouts in all"),
        ([([0, 1], [4])], r"group_sizes, in step 3, returned \[4\] for 2 prompts; return a list"),
        ([([0, 1], [8, 0])], r"returned \[8, 0\] for 2 prompts"),
        ([([0, 1], [4.0, 4.0])], r"returned \[4\.0, 4\.0\] for 2 prompts"),
        ([([0, 1], None)], "returned None for 2 prompts"),
        ([([0, 0], [4, 4])], "choose, in step 3, returned the position 0 twice"),
        ([([0], [8])], "returned 1 positions in all rounds; return at least .*num_selected=2"),
    ],
)
def test_numbers_that_cannot_be_rolled_out(script, message):
    with pytest.raises(UserError, match=f"selection.method=mine: .*{message}"):
        asked(Script(*script))


def test_without_sharing_no_prompt_comes_twice():
    with pytest.raises(UserError, match="the position 1 twice"):
        asked(Script(([0, 1], [4, 4]), ([1], [4]), shares_budget=False))
