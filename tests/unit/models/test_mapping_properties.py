"""Splitting and joining over random geometries: exact inverses, and equal to naive indexing.

Tensors are random bit patterns, NaNs among them, and are compared as bits.  The naive rules below
list row by row, in plain Python, the source of a rank's part.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prepo.models.mapping import Heads, Mapping, shard, to_hf, to_megatron, unshard

DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
MAX_TP = 8

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
dtypes = st.sampled_from(list(DTYPES))
seeds = st.integers(0, 2**32 - 1)
heads = st.builds(
    Heads,
    num_groups=st.integers(1, 5),
    head_dim=st.integers(1, 9),
    queries_per_group=st.integers(1, 4),
)


def random_bits(shape, dtype, seed):
    integers = DTYPES[dtype]
    limits = torch.iinfo(integers)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(limits.min, limits.max, shape, dtype=torch.int64, generator=generator)
    return bits.to(integers).view(dtype)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(DTYPES[a.dtype]), b.view(DTYPES[b.dtype]))


def divisors(number):
    return st.sampled_from([n for n in range(1, MAX_TP + 1) if number % n == 0])


def rank_parts(mapping, full, size, rows=None):
    """All ranks' parts; `rows`: of the padded vocabulary."""
    shape = [rows or full.shape[0], *full.shape[1:]]
    if mapping.split_dim is not None:
        shape[mapping.split_dim] //= size
    return [shard(mapping, full, torch.Size(shape), rank, size) for rank in range(size)]


def naive_qkv_row(index, geometry):
    """Return the (tensor, row) of q, k and v that is the row `index` of Megatron's matrix."""
    per_group = geometry.queries_per_group + 2
    head, within = divmod(index, geometry.head_dim)
    group, position = divmod(head, per_group)
    if position < geometry.queries_per_group:
        return 0, (group * geometry.queries_per_group + position) * geometry.head_dim + within
    return position - geometry.queries_per_group + 1, group * geometry.head_dim + within


@quick
@given(heads=heads, hidden=st.integers(1, 7), bias=st.booleans(), dtype=dtypes, seed=seeds)
def test_qkv_is_interleaved_as_naive_indexing_says_and_comes_back(heads, hidden, bias, dtype, seed):
    kv_rows = heads.num_groups * heads.head_dim
    counts = (kv_rows * heads.queries_per_group, kv_rows, kv_rows)
    columns = () if bias else (hidden,)
    tensors = [random_bits((n, *columns), dtype, seed + i) for i, n in enumerate(counts)]
    mapping = Mapping("qkv", ("q", "k", "v"))

    full = to_megatron(mapping, tensors, heads)

    rows = [naive_qkv_row(i, heads) for i in range(sum(counts))]
    assert same_bits(full, torch.stack([tensors[which][row] for which, row in rows]))
    back = to_hf(mapping, full, heads, 0)
    assert all(same_bits(a, b) for a, b in zip(back, tensors, strict=True))


@quick
@given(data=st.data(), heads=heads, dtype=dtypes, seed=seeds)
def test_a_rank_has_its_consecutive_rows_of_qkv_also_with_more_ranks_than_groups(
    data, heads, dtype, seed
):
    num_rows = heads.num_groups * (heads.queries_per_group + 2) * heads.head_dim
    size = data.draw(divisors(num_rows))
    full = random_bits((num_rows, 3), dtype, seed)
    mapping = Mapping("qkv", ("q", "k", "v"))

    parts = rank_parts(mapping, full, size)

    here = num_rows // size
    for rank, part in enumerate(parts):
        naive = torch.stack([full[rank * here + i] for i in range(here)])
        assert same_bits(part, naive) and part.is_contiguous()
    assert same_bits(unshard(mapping, parts), full)


@quick
@given(size=st.integers(1, MAX_TP), here=st.integers(1, 6), dtype=dtypes, seed=seeds)
def test_a_rank_has_the_same_rows_of_gate_and_of_up(size, here, dtype, seed):
    gate, up = (random_bits((size * here, 3), dtype, seed + i) for i in range(2))
    mapping = Mapping("gated", ("gate", "up"))

    full = to_megatron(mapping, [gate, up], None)
    parts = rank_parts(mapping, full, size)

    for rank, part in enumerate(parts):
        mine = range(rank * here, (rank + 1) * here)
        naive = torch.stack([gate[i] for i in mine] + [up[i] for i in mine])
        assert same_bits(part, naive) and part.is_contiguous()
    joined = unshard(mapping, parts)
    assert same_bits(joined, full)
    assert all(same_bits(a, b) for a, b in zip(to_hf(mapping, joined, None, 0), (gate, up)))


@quick
@given(size=st.integers(1, MAX_TP), here=st.integers(1, 6), rows=st.integers(1, 5), seed=seeds)
def test_a_rank_has_its_columns_of_a_row_parallel_matrix(size, here, rows, seed):
    full = random_bits((rows, size * here), torch.bfloat16, seed)
    mapping = Mapping("row", ("o",))

    parts = rank_parts(mapping, full, size)

    for rank, part in enumerate(parts):
        mine = range(rank * here, (rank + 1) * here)
        naive = torch.stack([torch.stack([row[i] for i in mine]) for row in full])
        assert same_bits(part, naive) and part.is_contiguous()
    assert same_bits(unshard(mapping, parts), full)


@quick
@given(
    size=st.integers(1, MAX_TP),
    vocab=st.integers(1, 40),
    more=st.integers(0, 3),
    dtype=dtypes,
    seed=seeds,
)
def test_a_rank_has_its_rows_of_the_vocabulary_and_zeros_after_its_end(
    size, vocab, more, dtype, seed
):
    """Includes ranks with only padding, which export removes whatever its values are."""
    here = -(-vocab // size) + more
    full = random_bits((vocab, 3), dtype, seed)
    mapping = Mapping("vocab", ("embedding",))

    parts = rank_parts(mapping, full, size, rows=here * size)

    for rank, part in enumerate(parts):
        for i in range(here):
            row = rank * here + i
            assert same_bits(part[i], full[row] if row < vocab else torch.zeros(3, dtype=dtype))
    joined = unshard(mapping, parts)
    joined[vocab:] = 7
    assert same_bits(to_hf(mapping, joined, None, vocab)[0], full)


@quick
@given(kind=st.sampled_from(["row", "qkv", "gated"]), size=st.integers(2, MAX_TP), seed=seeds)
def test_a_matrix_that_does_not_divide_is_refused(kind, size, seed):
    """It is never split into parts of unequal size."""
    mapping = Mapping(kind, ("t",))
    rows = 2 * (size + 1) if kind == "gated" else 2 * size + 1  # of each half: one too many
    full = random_bits((rows, 2 * size + 1), torch.float32, seed)
    shape = list(full.shape)
    shape[mapping.split_dim] = -(-shape[mapping.split_dim] // size)
    with pytest.raises(ValueError, match="part"):
        for rank in range(size):
            shard(mapping, full, torch.Size(shape), rank, size)
