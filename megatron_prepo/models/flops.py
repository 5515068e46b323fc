"""Number of floating-point operations that a model requires; utilisation is computed from it.

A product of an m x k and a k x n matrix is 2 m k n operations; nothing else is counted (norms,
rotations, softmax, the activation function, sampling, the optimizer).  With h the hidden size, q
and g the widths of queries and of keys, f the MLP's width, L layers and V the vocabulary, the
forward pass multiplies a token with

    L (h (q + 2 g) + q h)       the projections of attention
    L 3 h f                     a gated MLP; with experts, k 3 h f for the k chosen ones, and h e
                                for the router over all e
    h V                         the head, if the token is scored

parameters, N in total, each with one multiplication and one addition: 2 N.  In attention, a token's
queries are multiplied with the keys, then the values, of all tokens up to itself: 4 q operations
per layer and pair, with n (n + 1) / 2 pairs in a sequence of n, or with a sliding window only the
pairs within it (`causal_pairs`).  In the backward pass, a product has two: the gradients of its two
factors.  So a forward pass is F operations, and forward and backward together 3 F (2 N and 6 N per
token).

Recomputation (`recompute_granularity`, the head with `loss.head=recompute`) is not counted, and
neither is padding.  A prompt that several rollouts share is counted for each of them, what all
candidates begin with for each candidate, and a sequence's last token although nothing is predicted
from it: skipping them increases the utilisation, and does not change the formula.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_prepo.models.shape import Shape
from megatron_prepo.records import ScoredSequence


@dataclass(frozen=True)
class FlopCount:
    """Sizes of a pass over some sequences that determine its operations."""

    tokens: int = 0
    scored: int = 0
    """Number of tokens that the head processes."""
    pairs: int = 0
    """Number of pairs of a token and one that it attends to, including itself."""

    @classmethod
    def of(cls, sequences: Iterable[ScoredSequence], window: int | None = None) -> "FlopCount":
        """Return the sizes for causal attention within each sequence, and within a sliding window.

        >>> FlopCount.of([ScoredSequence((7, 8, 9), start=2), ScoredSequence((7, 8), start=1)])
        FlopCount(tokens=5, scored=2, pairs=9)
        """
        lengths_and_scored = [(len(s.tokens), s.num_scored) for s in sequences]
        return cls(
            tokens=sum(n for n, _ in lengths_and_scored),
            scored=sum(scored for _, scored in lengths_and_scored),
            pairs=sum(causal_pairs(n, window) for n, _ in lengths_and_scored),
        )

    def flops(self, shape: Shape) -> int:
        """Return the operations of a forward pass."""
        return forward_flops(shape, **vars(self))


def causal_pairs(length: int, window: int | None = None) -> int:
    """Return the pairs of a token and one that it attends to, including itself, in a sequence.

    >>> causal_pairs(5), causal_pairs(5, window=2), causal_pairs(5, window=9)
    (15, 9, 15)
    """
    outside = 0 if window is None else max(0, length - window)
    return (length * (length + 1) - outside * (outside + 1)) // 2


def forward_flops(shape: Shape, *, tokens: int, scored: int, pairs: int) -> int:
    """Return the operations of a forward pass, a third of those of forward and backward."""
    layer = 2 * layer_parameters(shape) * tokens + 4 * shape.queries * pairs
    return shape.layers * layer + 2 * shape.hidden * shape.vocabulary * scored


def layer_parameters(shape: Shape) -> int:
    """Return the number of parameters of a layer that are used per token."""
    attention = shape.hidden * (2 * shape.queries + 2 * shape.keys)
    mlp = 3 * shape.hidden * shape.mlp
    if not shape.experts:
        return attention + mlp
    return attention + shape.experts_per_token * mlp + shape.hidden * shape.experts
