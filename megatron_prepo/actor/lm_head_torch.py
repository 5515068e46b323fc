"""Torch versions of the two operations on rows of a chunk of logits.

`lm_head_triton` has Triton versions of the same functions.

They process one block of rows at a time, small enough to stay in a CPU's cache, so that only the
first of several passes reads memory; no operation depends on a tensor's contents (there is no
boolean index), so that none waits for a GPU.

Letters: C tokens per chunk, V columns of this rank, B rows per block.
"""

from collections.abc import Iterator

import torch

BLOCK_ELEMENTS = {"cpu": 2**16, "cuda": 2**24}
"""Elements per block: three blocks fit the cache of a CPU core, or one keeps a GPU busy."""

FAR_BELOW = -1e4
"""Lower bound for logits relative to the maximum, needed for -inf: e^-10000 is 0 in every
precision, and 0 times this number is 0, but 0 times -inf is NaN."""


def row_statistics(
    z_CV: torch.Tensor, target_C: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    """Return [4, C] of x = z / temperature: max, sum e^(x-max), sum (x-max) e^(x-max), x_target.

    `temperature`: one number, or one per token.  A target that is not a column of this rank gives
    -inf, and so does the maximum over zero columns; a row of only -inf has sums of 0.  NaN is
    propagated.
    """
    stats_4C = z_CV.new_zeros(4, len(z_CV))
    if z_CV.shape[1] == 0:  # every column of this rank is vocabulary padding
        stats_4C[[0, 3]] = -torch.inf
        return stats_4C
    for block, z_BV, scale_B1, (x_BV, exp_BV) in _blocks(z_CV, temperature):
        max_B, sum_B, weighted_B, target_B = stats_4C[:, block]
        torch.amax(z_BV, dim=1, out=max_B)
        origin_B1 = torch.where(max_B == -torch.inf, 0, max_B)[:, None]
        torch.sub(z_BV, origin_B1, out=x_BV).mul_(scale_B1)
        torch.exp(x_BV, out=exp_BV)
        torch.sum(exp_BV, dim=1, out=sum_B)
        torch.sum(exp_BV.mul_(x_BV.clamp_(min=FAR_BELOW)), dim=1, out=weighted_B)
        column_B1, hit_B1 = _columns(target_C[block], z_CV.shape[1])
        at_target_B1 = torch.where(hit_B1, z_BV.gather(1, column_B1), -torch.inf)
        target_B.copy_(at_target_B1.mul_(scale_B1)[:, 0])
        max_B[:, None].mul_(scale_B1)
    return stats_4C


def row_gradient(
    z_CV: torch.Tensor,
    target_C: torch.Tensor,
    temperature: float | torch.Tensor,
    lse_C: torch.Tensor,
    entropy_C: torch.Tensor,
    grad_logprobs_C: torch.Tensor,
    grad_entropy_C: torch.Tensor | None,
    out_CV: torch.Tensor,
) -> None:
    """Write the gradient of a sum by z to `out_CV` (may be `z_CV`), rounded to its type.

    The sum is

        sum_c grad_logprobs_c logp_c + grad_entropy_c H_c,

    and its gradient ( g 1[v = target] - p_v (g + h (ln p_v + H)) ) / temperature with g and h the
    two gradients.  `lse_C` and `entropy_C` are those of the full vocabulary; `grad_entropy_C=None`
    is the same as 0.
    """
    if z_CV.shape[1] == 0:
        return
    for block, z_BV, scale_B1, (x_BV, p_BV) in _blocks(z_CV, temperature):
        torch.sub(z_BV, lse_C[block, None] / scale_B1, out=x_BV).mul_(scale_B1)
        torch.exp(x_BV, out=p_BV)
        grad_B1 = at_target_B1 = grad_logprobs_C[block, None]
        if grad_entropy_C is None:
            # g (p - 1) takes one multiplication fewer than g p - g
            at_target_B1, factor_B1 = torch.ones_like(grad_B1), -scale_B1 * grad_B1
        else:
            grad_entropy_B1, factor_B1 = grad_entropy_C[block, None], -scale_B1
            constant_B1 = grad_B1 + grad_entropy_B1 * entropy_C[block, None]
            x_BV.clamp_(min=FAR_BELOW).mul_(grad_entropy_B1).add_(constant_B1)
            p_BV.mul_(x_BV)
        # subtracted before the result is rounded: g (p - 1) would not survive the rounding of g p
        column_B1, hit_B1 = _columns(target_C[block], z_CV.shape[1])
        p_BV.scatter_add_(1, column_B1, torch.where(hit_B1, -at_target_B1, 0))
        torch.mul(p_BV, factor_B1, out=out_CV[block])


def _blocks(
    z_CV: torch.Tensor, temperature: float | torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, float | torch.Tensor, torch.Tensor]]:
    """Yield blocks: row slice, logits, 1 / temperature as column or number, two scratch tensors."""
    rows = max(1, BLOCK_ELEMENTS[z_CV.device.type] // z_CV.shape[1])
    scratch_2BV = z_CV.new_empty(2, min(rows, len(z_CV)), z_CV.shape[1])
    for first in range(0, len(z_CV), rows):
        block = slice(first, first + rows)
        z_BV = z_CV[block]
        if isinstance(temperature, torch.Tensor):
            yield block, z_BV, 1 / temperature[block, None], scratch_2BV[:, : len(z_BV)]
        else:
            yield block, z_BV, 1 / temperature, scratch_2BV[:, : len(z_BV)]


def _columns(target_B: torch.Tensor, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a column of this rank per target, and whether it is the target's, both [B, 1]."""
    column_B1 = target_B.clamp(0, num_columns - 1)[:, None]
    return column_B1, column_B1 == target_B[:, None]
