"""Triton versions of the two operations on rows of a chunk of logits: logits are read once per row.

Same functions, arguments and results as `lm_head_torch`.  One program per row processes a block of
columns at a time, with an online maximum.  On a CPU they run only under Triton's interpreter, for
tests (TRITON_INTERPRET=1 before Triton is imported).

Offsets of rows are 64 bits wide: a chunk of 1,024 rows of 2.1 million columns overflows 32.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Columns per block."""
WARPS = 8


def row_statistics(
    z_CV: torch.Tensor, target_C: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    """Return statistics [4, C]; see `megatron_prepo.actor.lm_head_torch.row_statistics`."""
    num_rows, num_columns = z_CV.shape
    stats_4C = z_CV.new_empty(4, num_rows)
    if num_rows:
        scale_C = _scale(temperature, z_CV)
        _statistics[(num_rows,)](
            z_CV,
            target_C,
            scale_C,
            stats_4C,
            num_rows,
            num_columns,
            z_CV.stride(0),
            scale_C.stride(0),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
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
    """Write the gradient to `out_CV`; see `megatron_prepo.actor.lm_head_torch.row_gradient`."""
    num_rows, num_columns = z_CV.shape
    if num_rows == 0 or num_columns == 0:
        return
    scale_C = _scale(temperature, z_CV)
    _gradient[(num_rows,)](
        z_CV,
        target_C,
        scale_C,
        lse_C.contiguous(),
        entropy_C.contiguous(),
        grad_logprobs_C.contiguous(),
        lse_C if grad_entropy_C is None else grad_entropy_C.contiguous(),
        out_CV,
        num_columns,
        z_CV.stride(0),
        out_CV.stride(0),
        scale_C.stride(0),
        WITH_ENTROPY=grad_entropy_C is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def _scale(temperature: float | torch.Tensor, z_CV: torch.Tensor) -> torch.Tensor:
    """Return 1 / temperature of each row; a single number is stored once, with a stride of 0."""
    if isinstance(temperature, torch.Tensor):
        return 1 / temperature
    return z_CV.new_full((1,), 1 / temperature).expand(len(z_CV))


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]  # Triton would read annotations as types
    z,
    target,
    scale,
    stats,
    num_rows,
    num_columns,
    z_stride,
    scale_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    row_scale = tl.load(scale + row * scale_stride)
    maximum = tl.full((), float("-inf"), z.dtype.element_ty)
    total = tl.full((), 0.0, z.dtype.element_ty)
    weighted = tl.full((), 0.0, z.dtype.element_ty)
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(z + columns, mask=columns < num_columns, other=float("-inf")) * row_scale
        larger = tl.maximum(maximum, tl.max(x, axis=0))
        # only -inf so far: there is no maximum to subtract, and nothing to rescale
        origin = tl.where(larger == float("-inf"), 0.0, larger)
        down = tl.where(maximum == float("-inf"), 0.0, maximum - origin)
        x -= origin
        exp = tl.exp(x)
        rescale = tl.exp(down)
        # 0 * -inf is NaN: logits of -inf contribute to neither sum
        x_exp = tl.where(exp == 0.0, 0.0, x * exp)
        weighted = rescale * (weighted + down * total) + tl.sum(x_exp, axis=0)
        total = rescale * total + tl.sum(exp, axis=0)
        maximum = larger
    wanted = tl.load(target + row)
    here = (wanted >= 0) & (wanted < num_columns)
    at_target = tl.load(z + wanted, mask=here, other=float("-inf")) * row_scale
    tl.store(stats + row, maximum)
    tl.store(stats + num_rows + row, total)
    tl.store(stats + 2 * num_rows + row, weighted)
    tl.store(stats + 3 * num_rows + row, at_target)


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]  # Triton would read annotations as types
    z,
    target,
    scale,
    lse,
    entropy,
    grad_logprobs,
    grad_entropy,
    out,
    num_columns,
    z_stride,
    out_stride,
    scale_stride,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    out += row * out_stride
    row_scale = tl.load(scale + row * scale_stride)
    row_lse = tl.load(lse + row)
    wanted = tl.load(target + row)
    grad = tl.load(grad_logprobs + row)
    if WITH_ENTROPY:
        row_entropy = tl.load(entropy + row)
        grad_of_entropy = tl.load(grad_entropy + row)
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < num_columns
        logits = tl.load(z + columns, mask=inside, other=float("-inf"))
        # `out` may be `z` with fewer bytes per number: a block is stored in the place of blocks up
        # to this one, which all threads must have loaded
        tl.debug_barrier()
        logp = logits * row_scale - row_lse
        p = tl.exp(logp)
        factor = grad
        if WITH_ENTROPY:
            # p ln p is 0 where p is 0, also at logits of -inf
            surprise = tl.where(p == 0.0, 0.0, logp + row_entropy)
            factor = grad + grad_of_entropy * surprise
        # added before the result is rounded: g (1 - p) would not survive the rounding of g p
        dz = tl.where(columns == wanted, grad, 0.0) - p * factor
        tl.store(out + columns, (dz * row_scale).to(out.dtype.element_ty), mask=inside)
