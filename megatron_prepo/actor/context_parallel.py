"""Context parallelism: several ranks share the tokens of a row.

Everything but attention works token by token, so each of C ranks goes through the layers with its
slice of the row, S = T / C tokens.  Around attention all-to-alls give it all tokens, of some heads
(DeepSpeed-Ulysses, arXiv 2309.14509):

    [S, heads, d]  ->  [T, heads / C, d]  attention  [T, heads / C * d]  ->  [S, heads * d]

So attention sees whole rows as it does on one rank, and is the same, whatever its kernel.  Megatron
has no part in it: its groups know of the C ranks (gradients are averaged over them as over
data-parallel ranks), but `TransformerConfig.context_parallel_size` stays 1, since its attentions
would then split the sequence in their own ways.
"""

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import all_to_all


def context_group() -> dist.ProcessGroup | None:
    """The ranks that share rows with this one, in the order of their slices; None: it is alone."""
    group = parallel_state.get_context_parallel_group()
    return group if group.size() > 1 else None


def slice_of_row(num_tokens: int, group: dist.ProcessGroup | None) -> slice:
    """This rank's tokens of a row, whose length the size of `group` divides."""
    if group is None:
        return slice(0, num_tokens)
    size = num_tokens // group.size()
    assert size * group.size() == num_tokens, f"{num_tokens} tokens over {group.size()} ranks"
    return slice(group.rank() * size, (group.rank() + 1) * size)


def heads_of_a_rank(heads: int, ranks: int) -> int:
    """How many of so many heads each of `ranks` context-parallel ranks gets, repeated ones too.

    >>> heads_of_a_rank(8, 4), heads_of_a_rank(2, 4), heads_of_a_rank(3, 2)
    (2, 1, 3)
    """
    return math.lcm(heads, ranks) // ranks


def tokens_to_heads(x_SND: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[T / C, heads, d], this rank's tokens, to [T, heads / C, d], this rank's heads.

    Where C does not divide the heads (of keys and values), each is repeated as often as it takes
    for every rank to get those that its queries look at; autograd adds their gradients up.
    """
    ranks, (tokens, heads, size) = group.size(), x_SND.shape
    each = heads_of_a_rank(heads, ranks)
    x_SND = x_SND.unsqueeze(2).expand(-1, -1, each * ranks // heads, -1)
    parts_CSND = x_SND.reshape(tokens, ranks, each, size).movedim(1, 0)
    return all_to_all(group, parts_CSND).flatten(0, 1)


def heads_to_tokens(x_TH: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[T, heads / C * d], this rank's heads, to [T / C, heads * d], this rank's tokens."""
    parts_CSH = x_TH.unflatten(0, (group.size(), -1))
    return all_to_all(group, parts_CSH).movedim(0, 1).flatten(1)
