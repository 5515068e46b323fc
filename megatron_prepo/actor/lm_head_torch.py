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
    for block, z_BV, temperature_B1, (x_BV, exp_BV) in _blocks(z_CV, temperature):
        max_B, sum_B, weighted_B, target_B = stats_4C[:, block]
        torch.div(z_BV, temperature_B1, out=x_BV)
        torch.amax(x_BV, dim=1, out=max_B)
        column_B, hit_B = _columns(target_C[block], z_CV.shape[1])
        at_target_B = x_BV.gather(1, column_B[:, None])[:, 0]
        target_B.copy_(torch.where(hit_B, at_target_B, -torch.inf))
        x_BV.sub_(torch.where(max_B == -torch.inf, 0, max_B)[:, None])
        torch.exp(x_BV, out=exp_BV)
        torch.sum(exp_BV, dim=1, out=sum_B)
        torch.sum(exp_BV.mul_(x_BV.clamp_(min=FAR_BELOW)), dim=1, out=weighted_B)
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
    for block, z_BV, temperature_B1, (logp_BV, grad_BV) in _blocks(z_CV, temperature):
        torch.div(z_BV, temperature_B1, out=logp_BV).sub_(lse_C[block, None])
        torch.exp(logp_BV, out=grad_BV)
        grad_B1 = grad_logprobs_C[block, None]
        if grad_entropy_C is None:
            grad_BV.mul_(-grad_B1)
        else:
            surprise_BV = logp_BV.clamp_(min=FAR_BELOW).add_(entropy_C[block, None])
            factor_BV = surprise_BV.mul_(grad_entropy_C[block, None]).add_(grad_B1)
            grad_BV.mul_(factor_BV.neg_())
        # added before the result is rounded: g (1 - p) would not survive the rounding of g p
        column_B, hit_B = _columns(target_C[block], z_CV.shape[1])
        grad_BV.scatter_add_(1, column_B[:, None], torch.where(hit_B[:, None], grad_B1, 0))
        out_CV[block] = grad_BV.div_(temperature_B1)


def _blocks(
    z_CV: torch.Tensor, temperature: float | torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, float | torch.Tensor, torch.Tensor]]:
    """Yield blocks: row slice, logits, temperature as column or number, two scratch tensors."""
    rows = max(1, BLOCK_ELEMENTS[z_CV.device.type] // z_CV.shape[1])
    scratch_2BV = z_CV.new_empty(2, min(rows, len(z_CV)), z_CV.shape[1])
    for first in range(0, len(z_CV), rows):
        block = slice(first, first + rows)
        z_BV = z_CV[block]
        if isinstance(temperature, torch.Tensor):
            yield block, z_BV, temperature[block, None], scratch_2BV[:, : len(z_BV)]
        else:
            yield block, z_BV, temperature, scratch_2BV[:, : len(z_BV)]


def _columns(target_B: torch.Tensor, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a column of this rank per target, and whether it is the target's."""
    column_B = target_B.clamp(0, num_columns - 1)
    return column_B, column_B == target_B
