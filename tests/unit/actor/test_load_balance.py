"""Groups of equal sums and bins of bounded ones: nothing lost, nothing twice, and how equal."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prepo.actor.load_balance import balance, fill

quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)
COSTS = st.lists(st.floats(0, 1e6), max_size=40)


@quick
@given(COSTS, st.integers(1, 9))
def test_every_position_is_in_one_group(costs, num_groups):
    groups = balance(costs, num_groups)
    assert len(groups) == num_groups
    assert sorted(i for group in groups for i in group) == list(range(len(costs)))


@quick
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_two_groups_are_at_most_a_sixth_worse_than_the_best(costs):
    """The proven bound of largest differencing for two groups: 7/6 of the best there is."""
    sums = [sum(costs[i] for i in group) for group in balance(costs, 2)]
    best = min(
        max(sum(costs) - sum(chosen), sum(chosen))
        for size in range(len(costs) + 1)
        for chosen in itertools.combinations(costs, size)
    )
    assert 6 * max(sums) <= 7 * best


def test_largest_differencing_by_hand():
    """8 against 7 leaves 1, 6 against 5 leaves 1, 4 against 1 leaves 3, and 3 against 1: 2."""
    groups = balance([8, 7, 6, 5, 4], 2)
    assert sorted(sum([8, 7, 6, 5, 4][i] for i in group) for group in groups) == [14, 16]


@quick
@given(st.lists(st.integers(1, 100), max_size=40), st.integers(100, 300))
def test_no_bin_is_over_its_capacity_and_at_most_one_is_half_empty(sizes, capacity):
    bins = fill(sizes, capacity)
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(sizes)))
    sums = [sum(sizes[i] for i in chosen) for chosen in bins]
    assert all(total <= capacity for total in sums)
    # of two bins, the second was opened only because the first had no room for it
    assert sum(2 * total <= capacity for total in sums) <= 1


@pytest.mark.parametrize(("sizes", "bins"), [([], []), ([11], [[0]]), ([5, 11, 5], [[1], [0, 2]])])
def test_what_is_larger_than_a_bin_is_alone(sizes, bins):
    assert fill(sizes, 10) == bins
