"""Sequences to micro-batches: nothing lost, nothing twice, targets one ahead of tokens."""

import itertools
import math
import random

import pytest
import torch

from megatron_prepo.actor.batching import micro_batch, plan
from megatron_prepo.actor.vocab_parallel import IGNORE
from megatron_prepo.records import ScoredSequence

CASES = list(itertools.product([1, 2, 5, 8, 17], [1, 2, 3, 4, 8], [1, 2, 3, 8]))


@pytest.mark.parametrize(("num", "dp_size", "micro_batch_size"), CASES)
def test_every_sequence_exactly_once_in_equally_many_micro_batches(num, dp_size, micro_batch_size):
    """Pipelines and collectives need equal counts on all ranks, also of ranks without work."""
    lengths = random.Random(num).choices(range(2, 30), k=num)
    ranks = plan(lengths, dp_size, micro_batch_size)
    assert sorted(i for rank in ranks for index in rank for i in index) == list(range(num))
    assert len(ranks) == dp_size
    longest_share = math.ceil(num / dp_size)
    assert {len(rank) for rank in ranks} == {math.ceil(longest_share / micro_batch_size)}
    assert all(len(index) <= micro_batch_size for rank in ranks for index in rank)
    shares = [sum(len(index) for index in rank) for rank in ranks]
    assert max(shares) - min(shares) <= 1


def test_longest_first_so_that_lengths_of_a_micro_batch_are_close():
    lengths = [5, 9, 7, 3, 8, 9]
    assert plan(lengths, 1, 2) == [[[1, 5], [4, 2], [0, 3]]]
    assert plan(lengths, 2, 2) == [[[1, 4], [0]], [[5, 2], [3]]]


def test_no_sequences_still_give_every_rank_a_micro_batch():
    assert plan([], 2, 4) == [[[]], [[]]]


SEQUENCES = [
    ScoredSequence((11, 12, 13, 14, 15), 3),
    ScoredSequence((21, 22), 1),
    ScoredSequence((31, 32, 33), 1),
]


def test_tokens_and_targets_by_hand():
    """The prediction at position t is of token t + 1; the last of a prompt predicts the first of
    its completion.  Padding is never a target.
    """
    batch = micro_batch(SEQUENCES, [0, 2], multiple=1, device="cpu")
    x = IGNORE
    assert batch.index == (0, 2)
    assert batch.tokens_BS.tolist() == [[11, 12, 13, 14, 15], [31, 32, 33, 0, 0]]
    assert batch.targets_BS.tolist() == [[x, x, 14, 15, x], [32, 33, x, x, x]]


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (2, 6), (4, 8), (5, 5)])
def test_width_is_padded_to_a_multiple(multiple, width):
    batch = micro_batch(SEQUENCES, [1, 0], multiple=multiple, device="cpu")
    assert batch.tokens_BS[0].tolist() == [21, 22] + [0] * (width - 2)
    assert batch.tokens_BS[1].tolist() == [11, 12, 13, 14, 15] + [0] * (width - 5)
    assert batch.targets_BS[1].tolist() == [IGNORE, IGNORE, 14, 15] + [IGNORE] * (width - 4)


def test_scored_targets_are_the_sequences_own_tokens_in_order():
    batch = micro_batch(SEQUENCES, [2, 0, 1], multiple=4, device="cpu")
    for row, i in enumerate(batch.index):
        scored = batch.targets_BS[row] != IGNORE
        assert batch.targets_BS[row][scored].tolist() == list(
            SEQUENCES[i].tokens[SEQUENCES[i].start :]
        )
        assert scored.sum() == SEQUENCES[i].num_scored


def test_an_empty_micro_batch_is_a_row_without_a_target():
    batch = micro_batch(SEQUENCES, [], multiple=4, device="cpu")
    assert batch.index == ()
    assert torch.equal(batch.tokens_BS, torch.zeros(1, 4, dtype=torch.long))
    assert torch.equal(batch.targets_BS, torch.full((1, 4), IGNORE))


@pytest.mark.parametrize("start", [0, 3, 4])
def test_a_sequence_needs_a_predecessor_and_something_to_score(start):
    with pytest.raises(AssertionError, match="must leave a predecessor"):
        ScoredSequence((1, 2, 3), start)
