"""A planned row as tensors: what the model reads, what the head scores, where sequences lie.

T tokens of a row, W tokens of whole sequences (`attention.RowLayout`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from megatron_prepo.actor.attention import RowLayout
from megatron_prepo.actor.rows import Row
from megatron_prepo.actor.vocab_parallel import IGNORE
from megatron_prepo.records import ScoredSequence


@dataclass(frozen=True)
class MicroBatch:
    """A row as tensors."""

    index: tuple[int, ...]
    """The sequences in the order of their scored tokens."""
    tokens_T: torch.Tensor
    targets_T: torch.Tensor
    """The next token where it is to be scored, else `IGNORE`."""
    layout: RowLayout


def micro_batch(
    sequences: Sequence[ScoredSequence], row: Row, *, multiple: int = 1, device="cpu"
) -> MicroBatch:
    """The tensors of a row.

    One without a sequence becomes `multiple` tokens without a target, so that every pipeline stage
    has work.
    """
    size = row.load.tokens or multiple
    tokens_T = torch.zeros(size, dtype=torch.long)
    targets_T = torch.full_like(tokens_T, IGNORE)
    whole, lengths = [], []  # of the row's tokens, sequence by sequence
    place = 0
    for piece, piece_lengths in row.whole():
        first = torch.tensor(sequences[piece.index[0]].tokens[: piece.prefix], dtype=torch.long)
        tokens_T[place : place + piece.prefix] = first
        prefix = torch.arange(place, place + piece.prefix)
        place += piece.prefix
        for i, scored, length in zip(piece.index, piece.scored, piece_lengths, strict=True):
            tokens = torch.tensor(sequences[i].tokens[piece.prefix :])
            tokens_T[place : place + scored] = tokens[:-1]
            targets_T[place : place + scored] = tokens[1:]
            whole += [prefix, torch.arange(place, place + length - piece.prefix)]
            lengths.append(length)
            place += length - piece.prefix
    if not lengths:
        whole, lengths = [torch.arange(size)], [size]
    layout = _layout(torch.cat(whole), lengths, size, device)
    return MicroBatch(row.index, tokens_T.to(device), targets_T.to(device), layout)


def _layout(whole_W: torch.Tensor, lengths: Sequence[int], size: int, device) -> RowLayout:
    positions_W = torch.cat([torch.arange(length) for length in lengths])
    # of a token that is at several places, the first
    row_T = torch.full((size,), len(whole_W)).scatter_reduce(
        0, whole_W, torch.arange(len(whole_W)), "amin"
    )
    shared = len(whole_W) > size
    starts = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=device)
    return RowLayout(
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        positions_T=positions_W[row_T].to(device),
        lengths=tuple(lengths),
        whole_W=whole_W.to(device) if shared else None,
        row_T=row_T.to(device) if shared else None,
    )
