"""Matrix products of 16-bit inputs with float32 results, for the actor's and the engine's head.

A product of two bfloat16 numbers fits in a float32, and tensor cores add in float32 anyway:
keeping the float32 result requires no more arithmetic than rounding it, and rounding logits to
bfloat16 is the main cause of differences between engine and actor (NVIDIA-NeMo/RL#3936).
"""

import torch


def product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return a @ b in float32, or float64 for float64 inputs; written to `out` if given.

    On CUDA, 16-bit inputs are multiplied without conversion, by tensor cores.  A CPU has no such
    product and multiplies float32 copies; the result is the same except for the order of addition.
    """
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to `total`, which is float32 (or float64) for inputs of any type."""
    if a.dtype in (torch.float32, torch.float64):
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
