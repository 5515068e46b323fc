"""Which sequence is computed where: rows of tokens, the same plan on every rank.

A micro-batch is one row.  Sequences are dealt to data-parallel ranks so that all have equal work,
then each rank fills as few rows as will do with whole sequences, up to a budget of tokens.
Sequences with the same prompt may lie in a row with one copy of it.

The last token of a sequence is a target only, and has no place in the row.  So a sequence is its
prefix (the tokens before the last of the prompt; they predict nothing that is scored) and as many
more as get a score, the last of the prompt in front:

    prompt a b c, completion d e     prefix a b | c d     targets of c and d: d and e
    and another, x y z                          | c x y   targets x, y and z

All of it is arithmetic on lengths; `batching` makes the tensors.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_prepo.actor.load_balance import balance, fill
from megatron_prepo.models.flops import forward_flops
from megatron_prepo.models.shape import Shape
from megatron_prepo.records import ScoredSequence


@dataclass(frozen=True)
class Load:
    """What a forward pass has to do; adds up."""

    tokens: int = 0
    """Through the layers, padding included."""
    padding: int = 0
    """Of these, without meaning."""
    pairs: int = 0
    """Of a token and one that it looks at, itself too."""
    scored: int = 0
    """Tokens through the output head."""

    def __add__(self, other: "Load") -> "Load":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Load(*(one + more for one, more in pairs))

    def flops(self, shape: Shape) -> int:
        """Floating-point operations of the forward pass; a backward pass costs twice as many."""
        return forward_flops(shape, tokens=self.tokens, scored=self.scored, pairs=self.pairs)


@dataclass(frozen=True)
class Piece:
    """What stays together in a row: sequences with one prefix, or a single sequence."""

    index: tuple[int, ...]
    """Positions of the sequences in the list that is batched."""
    prefix: int
    """Tokens that the sequences share."""
    scored: tuple[int, ...]
    """Further tokens of each sequence."""

    @property
    def tokens(self) -> int:
        """Length in a row."""
        return self.prefix + sum(self.scored)


@dataclass(frozen=True)
class Row:
    """A micro-batch to be: pieces, each with padding behind it."""

    pieces: tuple[Piece, ...]
    padding: tuple[int, ...]

    @property
    def index(self) -> tuple[int, ...]:
        """The sequences of the row, in its order."""
        return tuple(i for piece in self.pieces for i in piece.index)

    @cached_property
    def load(self) -> Load:
        """Attention counts a prefix as often as it is shared: so it computes."""
        tokens = sum(piece.tokens for piece in self.pieces) + sum(self.padding)
        scored = sum(sum(piece.scored) for piece in self.pieces)
        lengths = [length for _, lengths in self.whole() for length in lengths]
        return Load(tokens, sum(self.padding), sum(n * (n + 1) // 2 for n in lengths), scored)

    def whole(self) -> Iterable[tuple[Piece, list[int]]]:
        """Each piece and the lengths of its whole sequences; padding belongs to the last."""
        for piece, padding in zip(self.pieces, self.padding, strict=True):
            lengths = [piece.prefix + scored for scored in piece.scored]
            lengths[-1] += padding
            yield piece, lengths


@dataclass(frozen=True)
class Plan:
    """The rows of every data-parallel rank, equally many on each."""

    ranks: tuple[tuple[Row, ...], ...]
    shape: Shape

    @property
    def load(self) -> Load:
        """Of all ranks."""
        return sum((row.load for rows in self.ranks for row in rows), Load())

    @property
    def padding_fraction(self) -> float:
        """Share of the tokens that is padding."""
        load = self.load
        return load.padding / max(1, load.tokens)

    @property
    def balance_ratio(self) -> float:
        """Operations of the busiest rank over those of the mean; 1 where there is nothing to do."""
        flops = [sum(row.load.flops(self.shape) for row in rows) for rows in self.ranks]
        return max(flops) * len(flops) / sum(flops) if any(flops) else 1.0


def pieces_of(sequences: Sequence[ScoredSequence], most: int | None = None) -> list[Piece]:
    """Each sequence by itself; or, given `most`, those of a prompt together, up to so many tokens.

    Prompts are the same only if the engine has routed their tokens to the same experts, too.

    >>> a, b = ScoredSequence((7, 8, 9, 1), 3), ScoredSequence((7, 8, 9, 2, 3), 3)
    >>> pieces_of([a, b], most=10)
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
) -> Plan:
    """Which sequence goes where.

    No row holds more than `budget` tokens, rounded up to a `multiple`; a rank may get a row without
    a sequence, when there are fewer than rows.  All ranks get as many rows, a multiple of
    `rows_multiple`.  Without `packing`, sequences of similar length lie side by side, padded to the
    longest.
    """
    if not packing:
        rows = _padded(pieces_of(sequences), num_ranks, budget, multiple, rows_multiple)
        return Plan(tuple(rows), shape)
    pieces = pieces_of(sequences)
    if share_prefixes:
        pieces = _shared_pieces(sequences, num_ranks, budget, shape)
    rows = _packed(pieces, num_ranks, budget, multiple, rows_multiple, shape)
    return Plan(tuple(rows), shape)


def _shared_pieces(
    sequences: Sequence[ScoredSequence], num_ranks: int, budget: int, shape: Shape
) -> list[Piece]:
    """Groups, cut as is best for the busiest rank: large pieces share more, small ones balance."""
    share = sum(len(s.tokens) - 1 for s in sequences) // num_ranks
    sizes = (share, share // 2, share // 4, share // 8, 0) if num_ranks > 1 else (budget,)
    choices = [pieces_of(sequences, min(budget, size)) for size in sizes]

    def busiest(pieces: list[Piece]) -> int:
        costs = _costs(pieces, shape)
        return max(sum(costs[i] for i in group) for group in balance(costs, num_ranks))

    return min(choices, key=busiest)


def _costs(pieces: Sequence[Piece], shape: Shape) -> list[int]:
    return [Row((piece,), (0,)).load.flops(shape) for piece in pieces]


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
        tuple(_packed_row([pieces[i] for i in chosen], multiple, budget) for chosen in bins)
        for bins in ranks
    ]


def _split_one(bins: list[list[int]], costs: Sequence[float]) -> None:
    """One bin more: the most expensive of several pieces becomes two, or an empty one is added."""
    several = [chosen for chosen in bins if len(chosen) > 1]
    if not several:
        bins.append([])
        return
    heaviest = max(several, key=lambda chosen: sum(costs[i] for i in chosen))
    bins.remove(heaviest)
    halves = balance([costs[i] for i in heaviest], 2)
    bins += [[heaviest[i] for i in half] for half in halves]


def _packed_row(pieces: Sequence[Piece], multiple: int, budget: int) -> Row:
    tokens = sum(piece.tokens for piece in pieces)
    assert tokens <= budget, f"{tokens} tokens in a row of at most {budget}"
    return Row(tuple(pieces), (*[0] * (len(pieces) - 1), -tokens % multiple)[: len(pieces)])


def _padded(
    pieces: Sequence[Piece], num_ranks: int, budget: int, multiple: int, rows_multiple: int
) -> list[tuple[Row, ...]]:
    longest_first = sorted(pieces, key=lambda piece: (-piece.tokens, piece.index))
    ranks = []
    for rank in range(num_ranks):
        rows = []
        for piece in longest_first[rank::num_ranks]:
            if not rows or (len(rows[-1]) + 1) * rows[-1][0].tokens > budget:
                rows.append([])
            rows[-1].append(piece)
        ranks.append(rows)
    num_rows = max(1, *map(len, ranks))
    num_rows += -num_rows % rows_multiple
    return [
        tuple(_padded_row(pieces, multiple) for pieces in (*rows, *[[]] * (num_rows - len(rows))))
        for rows in ranks
    ]


def _padded_row(pieces: Sequence[Piece], multiple: int) -> Row:
    width = max((piece.tokens for piece in pieces), default=0)
    width += -width % multiple
    return Row(tuple(pieces), tuple(width - piece.tokens for piece in pieces))
