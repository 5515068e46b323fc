"""Sequences to rows: nothing lost, nothing twice, budgets kept, ranks alike, targets one ahead."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prepo.actor.lm_head import IGNORE
from megatron_prepo.actor.micro_batch import micro_batch
from megatron_prepo.actor.packing import Load, Piece, Row, make_pieces, plan_rows
from megatron_prepo.models.routing import RoutingFormat
from megatron_prepo.models.shape import Shape
from megatron_prepo.records import ScoredSequence

ROUTING = RoutingFormat(layers=2, experts_per_token=2, experts=4)
SHAPE = Shape(
    layers=2,
    hidden=8,
    heads=2,
    groups=1,
    head_size=4,
    mlp=16,
    vocabulary=32,
    experts=0,
    experts_per_token=0,
    head_norms=False,
)
BUDGET = 40
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def batches(draw):
    """Draw sequences of at most 41 tokens, with few different prompts, each routed in two ways."""
    prompts = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1))
    sequences = []
    for _ in range(draw(st.integers(0, 30))):
        prompt, way = draw(st.sampled_from(prompts)), draw(st.booleans())
        rest = draw(st.lists(st.integers(3, 9), min_size=1, max_size=20))
        tokens = (*prompt, *rest)
        pairs = [(0, 1), (1, 2), (2, 0), (3, 1)]
        routing = bytes(
            e for t in tokens[:-1] for layer in (0, way) for e in pairs[(t + layer) % 4]
        )
        sequences.append(ScoredSequence(tokens, len(prompt), routing))
    return sequences


WAYS = st.sampled_from([{}, {"packing": False}, {"share_prefixes": True}])


@quick
@given(batches(), st.integers(1, 8), st.integers(1, 4), WAYS)
def test_every_sequence_once_in_as_many_rows_on_every_rank_within_the_budget(
    sequences, num_ranks, multiple, way
):
    plan = plan_rows(
        sequences, num_ranks=num_ranks, budget=BUDGET, shape=SHAPE, multiple=multiple, **way
    )
    assert len(plan.ranks) == num_ranks
    assert len({len(rows) for rows in plan.ranks}) == 1 and plan.ranks[0]
    rows = [row for rows in plan.ranks for row in rows]
    assert sorted(i for row in rows for i in row.index) == list(range(len(sequences)))
    for row in rows:
        load = row.load
        assert load.tokens % multiple == 0
        assert load.tokens <= BUDGET + (multiple - 1) * max(1, len(row.pieces))
        if way.get("packing", True):
            assert load.tokens - load.padding <= BUDGET and load.padding < multiple
    assert plan.load.scored == sum(s.num_scored for s in sequences)
    if way == {}:
        lengths = [len(s.tokens) - 1 for s in sequences]
        assert plan.load.tokens - plan.load.padding == sum(lengths)


@quick
@given(batches(), st.integers(1, 3), WAYS)
def test_tensors_of_a_row_give_every_sequence_back(sequences, multiple, way):
    """What attention sees of a sequence is the sequence; targets are the next tokens, in order."""
    plan = plan_rows(sequences, num_ranks=1, budget=BUDGET, shape=SHAPE, multiple=multiple, **way)
    for row in plan.ranks[0]:
        batch = micro_batch(sequences, row, multiple=multiple, routing=ROUTING)
        layout, at = batch.layout, 0
        routing_WLk = layout.whole(batch.routing_TLk) if batch.index else None
        tokens_W, positions_W = layout.whole(batch.tokens_T), layout.whole(layout.positions_T)
        for i, length in zip(batch.index, layout.lengths, strict=False):
            expected = sequences[i].tokens[:-1]
            assert tuple(tokens_W[at : at + len(expected)].tolist()) == expected
            assert positions_W[at : at + length].tolist() == list(range(length))
            routing_SLk, end = torch.from_numpy(ROUTING.unpack(sequences[i].routing)), at + length
            assert torch.equal(routing_WLk[at : at + len(expected)], routing_SLk)
            assert (routing_WLk[at + len(expected) : end] == -1).all()
            at += length
        assert sum(layout.lengths) == len(tokens_W) and max(layout.lengths) == layout.max_seqlen_q
        assert layout.cu_seqlens_q.tolist() == [
            sum(layout.lengths[:n]) for n in range(len(layout.lengths) + 1)
        ]
        assert torch.equal(layout.row(tokens_W), batch.tokens_T)
        targets = batch.targets_T[batch.targets_T != IGNORE].tolist()
        assert targets == [
            t for i in batch.index for t in sequences[i].tokens[sequences[i].start :]
        ]


A, B = ScoredSequence((1, 2, 3, 4, 5), 3), ScoredSequence((1, 2, 3, 6, 7, 8), 3)
C = ScoredSequence((9, 10, 11), 1)
X = IGNORE


def test_a_packed_row_by_hand():
    """The last token of a sequence has no place; padding goes to the last sequence."""
    row = Row(tuple(make_pieces([A, C])), (0, 2))
    batch = micro_batch([A, C], row)
    assert batch.index == (0, 1)
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 9, 10, 0, 0]
    assert batch.targets_T.tolist() == [X, X, 4, 5, 10, 11, X, X]
    assert batch.layout.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.layout.lengths == (4, 4) and batch.layout.whole_W is None
    assert row.load == Load(tokens=8, padding=2, pairs=20, scored=4)


def test_a_shared_prefix_by_hand():
    """The last token of the prompt stays with each completion: it predicts the first of it."""
    (piece, other) = make_pieces([A, C, B], most=10)
    assert piece == Piece(index=(2, 0), prefix=2, scored=(3, 2)) and other.index == (1,)
    row = Row((piece, other), (0, 1))
    batch = micro_batch([A, C, B], row)
    assert batch.tokens_T.tolist() == [1, 2, 3, 6, 7, 3, 4, 9, 10, 0]
    assert batch.targets_T.tolist() == [X, X, 6, 7, 8, 4, 5, 10, 11, X]
    assert batch.layout.positions_T.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 2]
    assert batch.layout.lengths == (5, 4, 3)
    assert batch.layout.whole_W.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9]
    assert batch.layout.row_T.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert row.load == Load(tokens=10, padding=1, pairs=15 + 10 + 6, scored=7)


@pytest.mark.parametrize(
    ("way", "pairs"),
    [({}, 9 + 3 + 12), ({"share_prefixes": True}, 9 + 3 + 12), ({"packing": False}, 3 * 12)],
    ids=str,
)
def test_pairs_outside_of_a_sliding_window_are_no_work(way, pairs):
    """Of 4, 2 and 5 tokens that see 3: 1 + 2 + 3 + 3, 1 + 2 and 1 + 2 + 3 + 3 + 3; padded, of 5."""
    shape = replace(SHAPE, window=3)
    plan = plan_rows([A, C, B], num_ranks=1, budget=15, shape=shape, **way)
    assert plan.load.pairs == pairs


def test_what_is_padded_lies_side_by_side():
    plan = plan_rows([A, C, B], num_ranks=1, budget=15, shape=SHAPE, packing=False)
    ((row,),) = plan.ranks
    batch = micro_batch([A, C, B], row)
    assert batch.tokens_T.view(3, 5).tolist() == [
        [1, 2, 3, 6, 7],
        [1, 2, 3, 4, 0],
        [9, 10, 0, 0, 0],
    ]
    assert plan.padding_fraction == 4 / 15
    plan = plan_rows([A, C, B], num_ranks=1, budget=14, shape=SHAPE, packing=False)
    assert [row.index for row in plan.ranks[0]] == [(2, 0), (1,)]


@pytest.mark.parametrize("packing", [True, False])
def test_every_rank_has_a_multiple_of_rows(packing):
    """An interleaved pipeline needs this; rows are halved, then empty rows are added."""
    for count in range(1, 9):
        sequences = [ScoredSequence(tuple(range(6)), 2)] * count
        plan = plan_rows(
            sequences, num_ranks=2, budget=10, shape=SHAPE, rows_multiple=4, packing=packing
        )
        assert {len(rows) for rows in plan.ranks} == {4}
        index = sorted(i for rows in plan.ranks for row in rows for i in row.index)
        assert index == list(range(count))


def test_a_row_without_a_sequence_is_tokens_without_a_target():
    plan = plan_rows([], num_ranks=2, budget=BUDGET, shape=SHAPE, multiple=4)
    assert plan.ranks == ((Row((), ()),), (Row((), ()),))
    batch = micro_batch([], plan.ranks[0][0], multiple=4)
    assert batch.index == () and batch.layout.lengths == (4,)
    assert torch.equal(batch.targets_T, torch.full((4,), IGNORE))
    assert (plan.padding_fraction, plan.balance_ratio, plan.load) == (0, 1, Load())


def test_a_sequence_longer_than_the_budget_is_not_squeezed_in():
    with pytest.raises(AssertionError, match="5 tokens in a row of at most 4"):
        plan_rows([B], num_ranks=1, budget=4, shape=SHAPE)


def test_prompts_without_a_prefix_have_nothing_to_share():
    """Perplexity scores from the second token on: all prompts that begin alike stay apart."""
    sequences = [ScoredSequence((1, n, n), 1) for n in range(4)]
    assert make_pieces(sequences, most=100) == make_pieces(sequences)


def rollouts(seed, groups=64, group_size=16, cap=8192):
    """Return rollouts of log-normal lengths around their prompt's mean, as of reasoning models."""
    draw, sequences = random.Random(seed), []
    for group in range(groups):
        prompt = (group,) * draw.randint(60, 400)
        mean = draw.lognormvariate(6.6, 0.6)
        for _ in range(group_size):
            length = max(1, min(cap - len(prompt), int(mean * draw.lognormvariate(0, 0.5))))
            sequences.append(ScoredSequence(prompt + (0,) * length, len(prompt)))
    return sequences


SEVEN = Shape(28, 3584, 28, 4, 128, 18944, 152064, 0, 0, False)


def both_plans(sequences, num_ranks):
    """Packed, and with shared prefixes."""
    return [
        plan_rows(
            sequences, num_ranks=num_ranks, budget=16384, shape=SEVEN, share_prefixes=share_prefixes
        )
        for share_prefixes in (False, True)
    ]


def busiest(plan):
    return plan.balance_ratio * plan.load.flops(SEVEN) / len(plan.ranks)


@pytest.mark.parametrize("num_ranks", [2, 8, 32])
def test_ranks_have_equal_work_on_a_log_normal_mix(num_ranks):
    packed, shared = both_plans(rollouts(num_ranks), num_ranks)
    assert packed.balance_ratio <= 1.03 and shared.balance_ratio <= 1.06
    assert busiest(shared) < busiest(packed)


@pytest.mark.parametrize("num_groups", [3, 8])
def test_few_groups_are_cut_where_that_is_better_for_the_busiest_rank(num_groups):
    """Unsplit groups on eight ranks would have uneven lengths."""
    packed, shared = both_plans(rollouts(3, groups=num_groups), 8)
    assert shared.load.tokens < packed.load.tokens and busiest(shared) < busiest(packed)
    whole = {piece.index for piece in make_pieces(rollouts(3, groups=num_groups), most=16384)}
    dealt = {piece.index for rows in shared.ranks for row in rows for piece in row.pieces}
    assert len(dealt) > len(whole)


def test_operations_by_hand():
    """One token of two layers: q and output 8 x 8, k and v 8 x 4, MLP three times 8 x 16."""
    a_layer = 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16)
    assert Load(tokens=1).flops(SHAPE) == 2 * a_layer
    assert Load(pairs=1).flops(SHAPE) == 2 * (2 * 8 + 2 * 8)
    assert Load(scored=1).flops(SHAPE) == 2 * 8 * 32


@pytest.mark.parametrize("start", [0, 3, 4])
def test_a_sequence_needs_a_predecessor_and_something_to_score(start):
    with pytest.raises(AssertionError, match="must leave a predecessor"):
        ScoredSequence((1, 2, 3), start)


def routed(sequence, *experts):
    """One layer and one expert per token, given by its number."""
    return ScoredSequence(sequence.tokens, sequence.start, bytes(experts))


def test_prompts_that_were_routed_differently_are_not_shared():
    """Routings are compared for all prompt tokens except the last, which is not shared."""
    one, same, other = routed(A, 5, 6, 0, 1), routed(B, 5, 6, 3, 4, 2), routed(B, 5, 7, 3, 4, 2)
    assert [piece.index for piece in make_pieces([one, same], most=10)] == [(1, 0)]
    assert [piece.index for piece in make_pieces([one, other], most=10)] == [(0,), (1,)]
    assert [piece.index for piece in make_pieces([one, B], most=10)] == [(0,), (1,)]


def test_the_routing_of_a_shared_prefix_by_hand():
    one, other, form = routed(A, 5, 6, 0, 1), routed(B, 5, 6, 3, 4, 2), RoutingFormat(1, 1, 8)
    [piece] = make_pieces([one, other], most=10)
    batch = micro_batch([one, other], Row((piece,), (1,)), routing=form)
    assert batch.routing_TLk.flatten().tolist() == [5, 6, 3, 4, 2, 0, 1, -1]
    assert micro_batch([one, other], Row((piece,), (1,))).routing_TLk is None
    assert micro_batch([A, B], Row((piece,), (1,)), routing=form).routing_TLk is None
    with pytest.raises(AssertionError, match="with and without a routing"):
        micro_batch([one, B], Row((piece,), (1,)), routing=form)


@pytest.mark.parametrize(
    ("scored", "expected"),
    [
        (slice(0, 6), [2, 1, 3]),
        (slice(0, 2), [2, 0, 0]),
        (slice(1, 4), [1, 1, 1]),
        (slice(3, 3), [0, 0, 0]),
        (slice(4, 6), [0, 0, 2]),
    ],
)
def test_scored_tokens_of_each_sequence_in_a_slice(scored, expected):
    batch = replace(micro_batch([], Row((), ())), scored=scored)
    assert batch.scored_here([2, 1, 3]) == expected
