"""Values of rollouts as rows, one per group; groups may differ in size.

Rows of equal size are a tensor `[K, G]`, others a tuple of K tensors.  Both iterate as K rows, and
all mathematics of groups is written for `[K, G]`: `each_group` applies it to either.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

Rows: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]


def as_rows(values_N: torch.Tensor, sizes: Sequence[int]) -> Rows:
    """Return the values of consecutive groups as rows.

    >>> as_rows(torch.arange(4), [2, 2])
    tensor([[0, 1],
            [2, 3]])
    >>> as_rows(torch.arange(3), [1, 2])
    (tensor([0]), tensor([1, 2]))
    """
    rows: tuple[torch.Tensor, ...] = values_N.split(list(sizes))
    return values_N.view(len(sizes), -1) if len(set(sizes)) == 1 else rows


def flat(rows: Rows) -> torch.Tensor:
    """Return `values_N`, the rows one after the other."""
    return rows.flatten() if isinstance(rows, torch.Tensor) else torch.cat(rows)


def each_group(function: Callable[..., torch.Tensor], *by_group: Rows) -> Rows:
    """Return the rows that a function of `[K, G]` makes of each group separately.

    `by_group`: the function's arguments, each of K rows, or `values_K`.  It gets them as they are
    where all groups have one size, so that no rounding depends on whether others may differ.
    """
    if isinstance(by_group[0], torch.Tensor):
        return function(*by_group)
    return tuple(
        function(*(row[None] for row in of_group))[0] for of_group in zip(*by_group, strict=True)
    )
