"""Attention of ranks that share a row's tokens equals that of one rank, in float64, with gradients.

One start of 4 ranks computes all cases; the tests look at its results.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import join, on_ranks
from rounding import Reference

from megatron_prepo.actor.attention import CausalAttention
from megatron_prepo.actor.context_parallel import slice_of_row
from megatron_prepo.actor.micro_batch import micro_batch
from megatron_prepo.actor.packing import plan_rows
from megatron_prepo.records import ScoredSequence
from tests.unit.actor.test_micro_batch import SHAPE

CONFIG = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, window_size=None)
SIZE = 6
SEQUENCES = [
    ScoredSequence((1, 2, 3, 4, 5), 3),
    ScoredSequence((9, 10, 11), 1),
    ScoredSequence((1, 2, 3, 6, 7, 8), 3),
]
HEADS = {
    # name: (ranks, heads, key-value heads)
    "each rank has its own": (2, 4, 2),
    "two ranks, one key-value head": (2, 4, 1),
    "four ranks, two key-value heads": (4, 8, 2),
    "a rank has one and half of the next": (2, 6, 3),
    "as many as heads": (4, 4, 4),
}
WAYS = {
    "packed": {},
    "padded": {"packing": False},
    "shared": {"share_prefixes": True},
}
CASES = [(heads, way) for heads in HEADS for way in WAYS]


def row_of(way, **options):
    plan = plan_rows(SEQUENCES, num_ranks=1, budget=20, shape=SHAPE, multiple=4, **WAYS[way])
    return micro_batch(SEQUENCES, plan.ranks[0][0], multiple=4, **options)


def qkv_and_weights(heads, tokens):
    """Queries, keys, values, and the weights that turn the output into a loss."""
    generator = torch.Generator().manual_seed(tokens)
    _, queries, groups = HEADS[heads]
    return [
        torch.randn(tokens, 1, *shape, dtype=torch.float64, generator=generator)
        for shape in ((queries, SIZE), (groups, SIZE), (groups, SIZE), (queries * SIZE,))
    ]


def attend(layout, *tensors):
    """Return the output and the gradients of queries, keys and values."""
    *qkv, weights = tensors
    qkv = [x.clone().requires_grad_() for x in qkv]
    out = CausalAttention(CONFIG, 1, None, "self")(*qkv, packed_seq_params=layout)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), qkv)]


def slices(results):
    """Return what this rank computes for each case, and its slice of the row."""
    for heads, way in CASES:
        if not join(HEADS[heads][0]):
            continue
        batch = row_of(way, context=dist.group.WORLD)
        whole = row_of(way)
        mine = slice_of_row(len(whole.tokens_T), dist.group.WORLD)
        tensors = qkv_and_weights(heads, len(whole.tokens_T))
        results[heads, way] = {
            "attention": attend(batch.layout, *(x[mine] for x in tensors)),
            "batch": replace(batch, layout=None),
            "positions": batch.layout.positions_T,
        }
        dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def results():
    return on_ranks(4, slices, {})


def of_ranks(results, case):
    return [rank[case] for rank in results if case in rank]


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_attention_and_its_gradients_are_those_of_one_rank(results, case):
    heads, way = case
    ranks = of_ranks(results, case)
    assert len(ranks) == HEADS[heads][0]
    layout = row_of(way).layout
    reference = Reference(attend, layout, *qkv_and_weights(heads, len(layout.positions_T)))
    ours = [torch.cat(parts) for parts in zip(*(r["attention"] for r in ranks), strict=True)]
    reference.assert_equals(ours)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_slices_make_up_the_row(results, case):
    ranks, row = of_ranks(results, case), row_of(case[1])
    for name in ("tokens_T", "targets_T"):
        assert torch.equal(
            torch.cat([getattr(r["batch"], name) for r in ranks]), getattr(row, name)
        )
    assert torch.equal(torch.cat([r["positions"] for r in ranks]), row.layout.positions_T)
    scored = [i for r in ranks for i in range(r["batch"].scored.start, r["batch"].scored.stop)]
    assert scored == list(range(*row.scored.indices(row.scored.stop)))
    assert row.scored == slice(0, sum(s.num_scored for s in SEQUENCES))
