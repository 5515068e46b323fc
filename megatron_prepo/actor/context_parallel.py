"""Context parallelism: several ranks share the tokens of a row.

Everything except attention works token by token, so each of C ranks computes the layers on its
slice of the row, S = T / C tokens.  Before and after attention, all-to-alls exchange tokens for
heads, so that each rank has all tokens of some heads (DeepSpeed-Ulysses, arXiv 2309.14509):

    [S, heads, d]  ->  [T, heads / C, d]  attention  [T, heads / C * d]  ->  [S, heads * d]

So attention sees complete rows as it does on one rank, and gives the same result with any kernel.
Megatron is not involved: its groups include the C ranks (gradients are averaged over them as over
data-parallel ranks), but `TransformerConfig.context_parallel_size` stays 1, since its attention
modules would otherwise split the sequence themselves.
"""

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import all_to_all


def context_group() -> dist.ProcessGroup | None:
    """Return the ranks that share rows with this one, in slice order; None if there are none."""
    group = parallel_state.get_context_parallel_group()
    return group if group.size() > 1 else None


def slice_of_row(num_tokens: int, group: dist.ProcessGroup | None) -> slice:
    """Return this rank's slice of a row; the size of `group` must divide the row's length."""
    if group is None:
        return slice(0, num_tokens)
    size = num_tokens // group.size()
    assert size * group.size() == num_tokens, f"{num_tokens} tokens over {group.size()} ranks"
    return slice(group.rank() * size, (group.rank() + 1) * size)


def heads_of_a_rank(heads: int, ranks: int) -> int:
    """Return the number of heads per context-parallel rank, including repeated ones.

    >>> heads_of_a_rank(8, 4), heads_of_a_rank(2, 4), heads_of_a_rank(3, 2)
    (2, 1, 3)
    """
    return math.lcm(heads, ranks) // ranks


def tokens_to_heads(x_SND: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Exchange this rank's tokens, [T / C, heads, d], for this rank's heads, [T, heads / C, d].

    If C does not divide the number of heads (of keys and values), each head is repeated until every
    rank has the heads that its queries attend to; autograd sums their gradients.
    """
    ranks, (tokens, heads, size) = group.size(), x_SND.shape
    each = heads_of_a_rank(heads, ranks)
    x_SND = x_SND.unsqueeze(2).expand(-1, -1, each * ranks // heads, -1)
    parts_CSND = x_SND.reshape(tokens, ranks, each, size).movedim(1, 0)
    return all_to_all(group, parts_CSND).flatten(0, 1)


def heads_to_tokens(x_TH: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Exchange this rank's heads, [T, heads / C * d], for its tokens, [T / C, heads * d]."""
    parts_CSH = x_TH.unflatten(0, (group.size(), -1))
    return all_to_all(group, parts_CSH).movedim(0, 1).flatten(1)
