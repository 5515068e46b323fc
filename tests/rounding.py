"""Allowances for rounding in a comparison.  No test chooses one by hand; there are two ways.

A bound, where the result is a closed form: each operation rounds by at most half an eps of its
result, so that n of them in sequence move a number by at most n eps of its size (Higham, Accuracy
and Stability of Numerical Algorithms, lemma 3.1, which has half of that):

    assert weight == approx(1 / 3)                              # CHAIN operations, float64
    assert loss.item() == approx(0.25, dtype=torch.float32)
    assert_close(sums_K, zeros_K, scale=8.0)                    # terms of size 8 that cancel

A measurement, where the result is a model's or a long sum's: the reference is computed twice, in
float64 and in float32, and our error may be `FACTOR` times the float32 error on this machine:

    reference = Reference(full_softmax, hidden_TH, weight_VH, targets_T)
    reference.assert_equals(ours)
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch.utils._pytree import tree_map

FACTOR = {torch.float32: 8, torch.bfloat16: 3}
"""Ratio by which our error may be larger.  One of two correct computations adds in an order that
errs more than the other's: over 14,635 tensors under all layouts, in float32, it was up to 2.0
times as much.  In bfloat16, with its larger errors, less room is left for them."""

NEGLIGIBLE = {torch.float32: 1 / 100, torch.bfloat16: 1 / 2}
"""Largest allowance as a fraction of the compared quantity: a larger one would let mistakes pass,
and fails the test."""

CHAIN = 100
"""Operations from inputs to result, where a test gives no number: more than any of these closed
forms has.  A library's function counts as four: those in use keep within 2 units in the last place.
"""

LEAST = 4
"""Smallest number of operations that a measured error is attributed to."""


def bound(operations: int, dtype: torch.dtype = torch.float64) -> float:
    """Return what `operations` in sequence round by at most, relative to the result."""
    return operations * torch.finfo(dtype).eps


def approx(
    expected, operations: int = CHAIN, *, dtype: torch.dtype = torch.float64, scale: float = 0.0
):
    """Return what equals `expected` up to the rounding of this many operations.

    `scale` is the size of terms that cancel: they are rounded relative to their own size.
    """
    allowed = bound(operations, dtype)
    return pytest.approx(expected, rel=allowed, abs=allowed * scale)


def assert_close(actual, expected, operations: int = CHAIN, *, scale: float = 0.0) -> None:
    """Assert that tensors, or tuples of them, are equal up to rounding by this many operations.

    Entries are compared relative to their own size, and to `scale`, the size of terms that cancel.
    """
    first = actual[0] if isinstance(actual, Sequence) else actual
    allowed = bound(operations, first.dtype)
    torch.testing.assert_close(
        actual, expected, rtol=allowed, atol=allowed * scale, check_dtype=False
    )


def allowance(error: float, size: float, dtype: torch.dtype = torch.float32) -> float:
    """Return what we may err by where an independent computation in `dtype` errs by `error`.

    Raises AssertionError where that is not negligible, relative to the size of the quantity.
    """
    allowed = FACTOR[dtype] * error
    assert allowed <= NEGLIGIBLE[dtype] * size, f"{allowed:.1e} of {size:.1e} would hide mistakes"
    return allowed


class Reference:
    """What an independent function computes in float64, and errs by in float32.

    Attributes:
        exact: the results in float64.
        errors: the largest error of an entry of each of them in float32; at least `LEAST` eps of
            its largest entry, for the error of few numbers may be small by chance.
    """

    def __init__(self, function: Callable, *args, **settings):
        self.exact, single = (
            function(*tree_map(cast, args), **tree_map(cast, settings))
            for cast in (to(torch.float64), to(torch.float32))
        )
        self.sizes = [largest_difference(exact, torch.zeros_like(exact)) for exact in self.exact]
        self.errors = [
            max(largest_difference(*both), bound(LEAST, torch.float32) * size)
            for *both, size in zip(single, self.exact, self.sizes, strict=True)
        ]

    def assert_equals(self, ours: Sequence[torch.Tensor]) -> None:
        """Assert that our results, or the first of them, are these up to rounding.

        Rounding errors are proportional to eps: of float64 results 2^-29 of float32's are allowed.
        Of bfloat16 ones, gradients of a head that is computed in float32, two roundings, one of
        the gradient of its logits, which are at most 2^-8 each.
        """
        for i, result in enumerate(ours):
            if result.dtype == torch.bfloat16:
                error, size = (result.double() - self.exact[i]).norm(), self.exact[i].norm()
                assert error <= 2 * 2**-8 * size, f"result {i}: off by {error / size:.1e}"
                continue
            finer = torch.finfo(result.dtype).eps / torch.finfo(torch.float32).eps
            allowed = allowance(self.errors[i] * finer, self.sizes[i])
            error = largest_difference(result, self.exact[i])
            assert error <= allowed, f"result {i}: off by {error:.1e}, allowed {allowed:.1e}"


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference of two entries, 0.0 for empty tensors; NaN equals nothing."""
    assert one.shape == other.shape
    difference = (one.double() - other.double()).abs()
    return difference.max().item() if difference.numel() else 0.0


def to(dtype: torch.dtype) -> Callable:
    """Return a function that casts tensors of floating point numbers and passes on all else."""

    def cast(value):
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.detach().to(dtype) if floats else value

    return cast


STEP = torch.finfo(torch.float64).eps ** (1 / 3)
"""Step of central differences: truncation, of the order of its square, is then as small as
rounding."""

DIFFERENCE = bound(CHAIN) / STEP
"""Error of a central difference, in parts of the function's values: CHAIN operations round these,
and the difference of two is divided by twice the step."""


def assert_gradients(function: Callable, inputs: Sequence[torch.Tensor], scale: float) -> None:
    """Assert that a function's gradients, where its values are of size `scale`, are its central
    differences in float64.
    """
    torch.autograd.gradcheck(function, tuple(inputs), eps=STEP, atol=DIFFERENCE * scale, rtol=0.0)
