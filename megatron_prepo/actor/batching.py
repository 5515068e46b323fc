"""Sequences to micro-batches: the same plan on every rank, each data-parallel rank its part.

Sequences are dealt to ranks by length, and each rank cuts its own, longest first, into equally many
micro-batches; rows are padded on the right to the longest of their micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_prepo.actor.vocab_parallel import IGNORE
from megatron_prepo.records import ScoredSequence


@dataclass(frozen=True)
class MicroBatch:
    """B sequences padded to S tokens."""

    index: tuple[int, ...]
    """Each row's position in the list that was batched; rows beyond these are padding."""
    tokens_BS: torch.Tensor
    targets_BS: torch.Tensor
    """The next token where it is to be scored, else `IGNORE`."""


def plan(lengths: Sequence[int], dp_size: int, micro_batch_size: int) -> list[list[list[int]]]:
    """`[dp_rank][micro_batch]` -> positions of sequences; equally many micro-batches on each rank.

    A rank may get an empty micro-batch, when there are fewer sequences than ranks.

    >>> plan([5, 9, 7, 3, 8], dp_size=2, micro_batch_size=2)
    [[[1, 2], [3]], [[4, 0], []]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shares = [longest_first[rank::dp_size] for rank in range(dp_size)]
    num_micro_batches = max(1, -(-len(shares[0]) // micro_batch_size))
    return [
        [share[m * micro_batch_size : (m + 1) * micro_batch_size] for m in range(num_micro_batches)]
        for share in shares
    ]


def micro_batch(
    sequences: Sequence[ScoredSequence], index: Sequence[int], *, multiple: int, device
) -> MicroBatch:
    """The chosen sequences as tensors; S is a multiple of `multiple`.

    An empty choice gives one row without a scored token, so that every pipeline stage has work.
    """
    longest = max((len(sequences[i].tokens) for i in index), default=1)
    width = -(-longest // multiple) * multiple
    tokens_BS = torch.zeros(max(1, len(index)), width, dtype=torch.long)
    targets_BS = torch.full_like(tokens_BS, IGNORE)
    for row, i in enumerate(index):
        tokens, start = torch.tensor(sequences[i].tokens), sequences[i].start
        tokens_BS[row, : len(tokens)] = tokens
        targets_BS[row, start - 1 : len(tokens) - 1] = tokens[start:]
    return MicroBatch(tuple(index), tokens_BS.to(device), targets_BS.to(device))
