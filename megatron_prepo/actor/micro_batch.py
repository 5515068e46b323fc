"""A planned row as tensors: input of the model, targets of the head, positions of sequences.

T tokens of a row, W tokens of complete sequences (`attention.RowLayout`); L layers, k experts per
token.  Under context parallelism, tokens, targets, positions and routing are those of this rank's
slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

from megatron_prepo.actor.attention import RowLayout
from megatron_prepo.actor.context_parallel import slice_of_row
from megatron_prepo.actor.lm_head import IGNORE
from megatron_prepo.actor.packing import Row
from megatron_prepo.models.routing import RoutingFormat
from megatron_prepo.records import ScoredSequence


@dataclass(frozen=True)
class MicroBatch:
    """A row as tensors."""

    index: tuple[int, ...]
    """Sequences of the row, in the order of their scored tokens."""
    scored: slice
    """Range of the row's scored tokens whose targets are in this slice."""
    tokens_T: torch.Tensor
    targets_T: torch.Tensor
    """Next token if it is scored, else `IGNORE`."""
    layout: RowLayout
    routing_TLk: torch.Tensor | None = None
    """Experts to replay, on the CPU; -1, for padding: the actor's choice.  None: its choice for all
    tokens."""

    def scored_here(self, lengths: Sequence[int]) -> list[int]:
        """Return how many scored tokens of each sequence are in this slice, of these in the row."""
        first, last = self.scored.start, self.scored.stop
        ends = zip(accumulate(lengths), lengths, strict=True)
        return [max(0, min(end, last) - max(end - length, first)) for end, length in ends]


def micro_batch(
    sequences: Sequence[ScoredSequence],
    row: Row,
    *,
    multiple: int = 1,
    context: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    routing: RoutingFormat | None = None,
) -> MicroBatch:
    """Return the tensors of a row, or of this rank's slice if the ranks of `context` share it.

    The routing of the sequences is included if its format is given and they have one.

    A row without sequences becomes `multiple` tokens without targets, so that every pipeline stage
    has work.
    """
    size = row.load.tokens or multiple
    tokens_T = torch.zeros(size, dtype=torch.long)
    targets_T = torch.full_like(tokens_T, IGNORE)
    whole: list[torch.Tensor] = []  # indices of the row's tokens, sequence by sequence
    lengths: list[int] = []
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
    mine = slice_of_row(size, context)
    routing_TLk = _routing(sequences, row, size, routing) if routing else None
    before = int((targets_T[: mine.start] != IGNORE).sum())
    here = int((targets_T[mine] != IGNORE).sum())
    return MicroBatch(
        index=row.index,
        scored=slice(before, before + here),
        tokens_T=tokens_T[mine].to(device),
        targets_T=targets_T[mine].to(device),
        layout=_layout(torch.cat(whole), lengths, size, mine, context, device),
        routing_TLk=None if routing_TLk is None else routing_TLk[mine],
    )


def _routing(
    sequences: Sequence[ScoredSequence], row: Row, size: int, routing: RoutingFormat
) -> torch.Tensor | None:
    if all(sequences[i].routing is None for i in row.index):
        return None
    shape = (size, routing.layers, routing.experts_per_token)
    routing_TLk = torch.full(shape, -1, dtype=torch.int16)
    place = 0
    for piece, lengths in row.whole():
        for n, (i, scored, length) in enumerate(
            zip(piece.index, piece.scored, lengths, strict=True)
        ):
            packed = sequences[i].routing
            assert packed is not None, "sequences with and without a routing in one row"
            experts_TLk = torch.from_numpy(routing.unpack(packed))
            if n == 0:
                routing_TLk[place : place + piece.prefix] = experts_TLk[: piece.prefix]
                place += piece.prefix
            routing_TLk[place : place + scored] = experts_TLk[piece.prefix :]
            place += length - piece.prefix
    return routing_TLk


def _layout(
    whole_W: torch.Tensor,
    lengths: Sequence[int],
    size: int,
    mine: slice,
    context: dist.ProcessGroup | None,
    device: torch.device | str,
) -> RowLayout:
    positions_W = torch.cat([torch.arange(length) for length in lengths])
    # the first place of a token that occurs several times
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
        positions_T=positions_W[row_T[mine]].to(device),
        lengths=tuple(lengths),
        whole_W=whole_W.to(device) if shared else None,
        row_T=row_T.to(device) if shared else None,
        context=context,
    )
