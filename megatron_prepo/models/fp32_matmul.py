"""Matrix products of 16-bit inputs with float32 results, for the actor's and the engine's head.

A product of two bfloat16 numbers fits a float32, and tensor cores add in float32 anyway: keeping
the result costs no more arithmetic than rounding it, and logits rounded to bfloat16 are what makes
engine and actor disagree most (NVIDIA-NeMo/RL#3936).
"""

import torch


def product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """A @ b in float32, or float64 for float64 inputs; into `out` if given.

    The inputs are multiplied as they are: 16-bit tensor cores on CUDA.  A CPU has no such product
    and multiplies float32 copies, with the same result but for the order of addition.
    """
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Total += a @ b, where `total` is float32 (or float64) whatever the inputs are."""
    if a.dtype in (torch.float32, torch.float64):
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
