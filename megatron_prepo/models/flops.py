"""Floating-point operations that a model's mathematics asks for; utilisation is counted by them.

A product of an m x k and a k x n matrix is 2 m k n operations; nothing else is counted (norms,
rotations, softmax, the activation function, sampling, the optimizer).  With h the hidden size, q
and g the widths of queries and of keys, f the MLP's width, L layers and V the vocabulary, a token
meets in the forward pass

    L (h (q + 2 g) + q h)       the projections of attention
    L 3 h f                     a gated MLP; of experts, k 3 h f for the k that it takes, and h e
                                for the router over all e
    h V                         the head, if the token is scored

parameters, each with one multiplication and one addition: 2 N.  In attention a token's queries meet
the keys, then the values, of all tokens up to itself: 4 q operations a layer for each such pair,
n (n + 1) / 2 pairs in a sequence of n.  Backward, a product makes two: the gradients of either
side.  So forward is F, and forward with backward 3 F (2 N and 6 N a token).

What is computed again (`recompute_granularity`, the head with `loss.head=recompute`) is not counted
twice, padding not at all.  A prompt that several rollouts share counts for each of them, and so
does a sequence's last token, though nothing is predicted from it: who leaves them out has a higher
utilisation, not another formula.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_prepo.models.shape import Shape
from megatron_prepo.records import ScoredSequence


@dataclass(frozen=True)
class FlopCount:
    """What passes over some sequences ask for."""

    tokens: int = 0
    scored: int = 0
    """Tokens that the head sees."""
    pairs: int = 0
    """A token and one that it attends to, itself included."""

    @classmethod
    def of(cls, sequences: Iterable[ScoredSequence]) -> "FlopCount":
        """Causal attention, each sequence for itself.

        >>> FlopCount.of([ScoredSequence((7, 8, 9), start=2), ScoredSequence((7, 8), start=1)])
        FlopCount(tokens=5, scored=2, pairs=9)
        """
        lengths_and_scored = [(len(s.tokens), s.num_scored) for s in sequences]
        return cls(
            tokens=sum(n for n, _ in lengths_and_scored),
            scored=sum(scored for _, scored in lengths_and_scored),
            pairs=sum(n * (n + 1) // 2 for n, _ in lengths_and_scored),
        )

    def flops(self, shape: Shape) -> int:
        """Operations of a forward pass."""
        return forward_flops(shape, **vars(self))


def forward_flops(shape: Shape, *, tokens: int, scored: int, pairs: int) -> int:
    """Operations of a forward pass; with the backward pass it is three times as many."""
    layer = 2 * layer_parameters(shape) * tokens + 4 * shape.queries * pairs
    return shape.layers * layer + 2 * shape.hidden * shape.vocabulary * scored


def layer_parameters(shape: Shape) -> int:
    """Parameters of one layer's matrices that a token meets."""
    attention = shape.hidden * (2 * shape.queries + 2 * shape.keys)
    mlp = 3 * shape.hidden * shape.mlp
    if not shape.experts:
        return attention + mlp
    return attention + shape.experts_a_token * mlp + shape.hidden * shape.experts
