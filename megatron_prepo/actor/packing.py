"""Assignment of sequences to ranks and rows of tokens, the same plan on every rank.

A micro-batch is one row.  Sequences are assigned to data-parallel ranks so that all have equal
work, then each rank packs complete sequences into as few rows as possible, up to a budget of
tokens.  Sequences with the same prompt may share one copy of it in a row.

The last token of a sequence is only a target, and is not part of the row.  So a sequence consists
of its prefix (the tokens before the last one of the prompt, which predict no scored token) and one
further token per score, starting with the last one of the prompt:

    prompt a b c, completion d e     prefix a b | c d     targets of c and d: d and e
    and another, x y z                          | c x y   targets x, y and z

Everything here is arithmetic on lengths; `batching` builds the tensors.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_prepo.actor.load_balance import balance, fill
from megatron_prepo.models.flops import causal_pairs, forward_flops
from megatron_prepo.models.shape import Shape
from megatron_prepo.records import ScoredSequence


@dataclass(frozen=True)
class Load:
    """Work of a forward pass; loads can be added."""

    tokens: int = 0
    """Tokens in the layers, including padding."""
    padding: int = 0
    """Padding tokens among them."""
    pairs: int = 0
    """Pairs of a token and a token that it attends to, including itself."""
    scored: int = 0
    """Tokens in the output head."""

    def __add__(self, other: "Load") -> "Load":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Load(*(one + more for one, more in pairs))

    def flops(self, shape: Shape) -> int:
        """Return the floating-point operations of the forward pass; backward has twice as many."""
        return forward_flops(shape, tokens=self.tokens, scored=self.scored, pairs=self.pairs)


@dataclass(frozen=True)
class Piece:
    """Unit of a row that is not split: sequences with a common prefix, or a single sequence."""

    index: tuple[int, ...]
    """Positions of the sequences in the list that is batched."""
    prefix: int
    """Number of tokens that the sequences share."""
    scored: tuple[int, ...]
    """Number of further tokens of each sequence."""

    @property
    def tokens(self) -> int:
        """Length in a row."""
        return self.prefix + sum(self.scored)


@dataclass(frozen=True)
class Row:
    """A planned micro-batch: pieces, each followed by padding."""

    pieces: tuple[Piece, ...]
    padding: tuple[int, ...]
    window: int | None = None
    """The model's sliding window."""

    @property
    def index(self) -> tuple[int, ...]:
        """Sequences of the row, in its order."""
        return tuple(i for piece in self.pieces for i in piece.index)

    @cached_property
    def load(self) -> Load:
        """Work of the row; attention counts a prefix once per sequence, as it is computed."""
        tokens = sum(piece.tokens for piece in self.pieces) + sum(self.padding)
        scored = sum(sum(piece.scored) for piece in self.pieces)
        lengths = [length for _, lengths in self.whole() for length in lengths]
        pairs = sum(causal_pairs(n, self.window) for n in lengths)
        return Load(tokens, sum(self.padding), pairs, scored)

    def whole(self) -> Iterable[tuple[Piece, list[int]]]:
        """Yield each piece and the lengths of its complete sequences; the last includes padding."""
        for piece, padding in zip(self.pieces, self.padding, strict=True):
            lengths = [piece.prefix + scored for scored in piece.scored]
            lengths[-1] += padding
            yield piece, lengths


@dataclass(frozen=True)
class PackingPlan:
    """Rows of every data-parallel rank, the same number on each."""

    ranks: tuple[tuple[Row, ...], ...]
    shape: Shape

    @property
    def load(self) -> Load:
        """Total work of all ranks."""
        return sum((row.load for rows in self.ranks for row in rows), Load())

    @property
    def padding_fraction(self) -> float:
        """Share of tokens that are padding."""
        load = self.load
        return load.padding / max(1, load.tokens)

    @property
    def balance_ratio(self) -> float:
        """Operations of the busiest rank divided by the mean over ranks; 1 if there is no work."""
        flops = [sum(row.load.flops(self.shape) for row in rows) for rows in self.ranks]
        return max(flops) * len(flops) / sum(flops) if any(flops) else 1.0


def make_pieces(sequences: Sequence[ScoredSequence], most: int | None = None) -> list[Piece]:
    """Return one piece per sequence; or, given `most`, pieces per prompt of at most `most` tokens.

    Prompts are the same only if the engine also routed their tokens to the same experts.

    >>> a, b = ScoredSequence((7, 8, 9, 1), 3), ScoredSequence((7, 8, 9, 2, 3), 3)
    >>> make_pieces([a, b], most=10)
    [Piece(index=(1, 0), prefix=2, scored=(2, 1))]
    """
    groups = defaultdict(list)
    for i, sequence in enumerate(sequences):
        shared = most is not None and sequence.start > 1
        routing = sequence.routing_of_first(sequence.start - 1)
        groups[(sequence.tokens[: sequence.start], routing) if shared else i].append(i)
    pieces = []
    for group in groups.values():
        prefix = sequences[group[0]].start - 1
        sizes = [sequences[i].num_scored for i in group]
        for chosen in fill(sizes, 0 if most is None else most - prefix):
            index = tuple(group[c] for c in chosen)
            pieces.append(Piece(index, prefix, tuple(sizes[c] for c in chosen)))
    return pieces


def plan_rows(
    sequences: Sequence[ScoredSequence],
    *,
    num_ranks: int,
    budget: int,
    shape: Shape,
    multiple: int = 1,
    rows_multiple: int = 1,
    packing: bool = True,
    share_prefixes: bool = False,
) -> PackingPlan:
    """Assign sequences to ranks and rows.

    No row holds more than `budget` tokens, rounded up to a `multiple`; a rank may get rows without
    sequences if there are fewer sequences than rows.  All ranks get the same number of rows, a
    multiple of `rows_multiple`.  Without `packing`, sequences of similar length are padded to the
    longest one.
    """
    if not packing:
        rows = _padded(
            make_pieces(sequences), num_ranks, budget, multiple, rows_multiple, shape.window
        )
        return PackingPlan(tuple(rows), shape)
    pieces = make_pieces(sequences)
    if share_prefixes:
        pieces = _shared_pieces(sequences, num_ranks, budget, shape)
    rows = _packed(pieces, num_ranks, budget, multiple, rows_multiple, shape)
    return PackingPlan(tuple(rows), shape)


def _shared_pieces(
    sequences: Sequence[ScoredSequence], num_ranks: int, budget: int, shape: Shape
) -> list[Piece]:
    """Return groups split so that the busiest rank has least work.

    Large pieces share more, small ones balance better.
    """
    share = sum(len(s.tokens) - 1 for s in sequences) // num_ranks
    sizes = (share, share // 2, share // 4, share // 8, 0) if num_ranks > 1 else (budget,)
    choices = [make_pieces(sequences, min(budget, size)) for size in sizes]

    def busiest(pieces: list[Piece]) -> int:
        costs = _costs(pieces, shape)
        return max(sum(costs[i] for i in group) for group in balance(costs, num_ranks))

    return min(choices, key=busiest)


def _costs(pieces: Sequence[Piece], shape: Shape) -> list[int]:
    return [Row((piece,), (0,), shape.window).load.flops(shape) for piece in pieces]


def _packed(
    pieces: Sequence[Piece],
    num_ranks: int,
    budget: int,
    multiple: int,
    rows_multiple: int,
    shape: Shape,
) -> list[tuple[Row, ...]]:
    costs = _costs(pieces, shape)
    ranks = []
    for share in balance(costs, num_ranks):
        bins = fill([pieces[i].tokens for i in share], budget)
        ranks.append([[share[i] for i in chosen] for chosen in bins])
    num_rows = max(1, *map(len, ranks))
    num_rows += -num_rows % rows_multiple
    for bins in ranks:
        while len(bins) < num_rows:
            _split_one(bins, costs)
        bins.sort(key=lambda chosen: -sum(costs[i] for i in chosen))
    return [
        tuple(
            _packed_row([pieces[i] for i in chosen], multiple, budget, shape.window)
            for chosen in bins
        )
        for bins in ranks
    ]


def _split_one(bins: list[list[int]], costs: Sequence[float]) -> None:
    """Add one bin: split the most expensive bin with several pieces, or add an empty one."""
    several = [chosen for chosen in bins if len(chosen) > 1]
    if not several:
        bins.append([])
        return
    heaviest = max(several, key=lambda chosen: sum(costs[i] for i in chosen))
    bins.remove(heaviest)
    halves = balance([costs[i] for i in heaviest], 2)
    bins += [[heaviest[i] for i in half] for half in halves]


def _packed_row(pieces: Sequence[Piece], multiple: int, budget: int, window: int | None) -> Row:
    tokens = sum(piece.tokens for piece in pieces)
    assert tokens <= budget, f"{tokens} tokens in a row of at most {budget}"
    padding = (*[0] * (len(pieces) - 1), -tokens % multiple)[: len(pieces)]
    return Row(tuple(pieces), padding, window)


def _padded(
    pieces: Sequence[Piece],
    num_ranks: int,
    budget: int,
    multiple: int,
    rows_multiple: int,
    window: int | None,
) -> list[tuple[Row, ...]]:
    longest_first = sorted(pieces, key=lambda piece: (-piece.tokens, piece.index))
    ranks = []
    for rank in range(num_ranks):
        rows: list[list[Piece]] = []
        for piece in longest_first[rank::num_ranks]:
            if not rows or (len(rows[-1]) + 1) * rows[-1][0].tokens > budget:
                rows.append([])
            rows[-1].append(piece)
        ranks.append(rows)
    num_rows = max(1, *map(len, ranks))
    num_rows += -num_rows % rows_multiple
    for rows in ranks:
        rows += [[]] * (num_rows - len(rows))
    return [tuple(_padded_row(pieces, multiple, window) for pieces in rows) for rows in ranks]


def _padded_row(pieces: Sequence[Piece], multiple: int, window: int | None) -> Row:
    width = max((piece.tokens for piece in pieces), default=0)
    width += -width % multiple
    return Row(tuple(pieces), tuple(width - piece.tokens for piece in pieces), window)
