"""List pipelines: a short list of digits, changed step by step, and one question about the result.

    prompt    list 3 1 4 5 : sort drop 2 sum =
    worked    sort 1 3 4 5 drop 4 5 sum 4 , 9 #### 9
    direct    #### 9

The worked answer writes the list after every operation; a sum is written as running totals.
``ends`` asks for the product of the first and the last digit. Most operations and questions have
several names, of which some are rare.

``CORPUS`` is what the base model is trained on: short pipelines of common operations under their
common names. ``POOL`` is what reinforcement learning and evaluation use: longer lists and
pipelines, rarer operations and names. No list is ever empty.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tiny_task import Problem, zipf

Items = list[int]


@dataclass(frozen=True)
class Operation:
    """Something done to a list, under its names, the most common one first."""

    names: tuple[str, ...]
    apply: Callable[[Items, int], Items]
    numbers: range | None = None
    """Where it takes a number: those that leave most of a list."""


# The order is the rank in the Zipf mixtures below: the first operation is the most common one.
OPERATIONS = (
    Operation(("reverse", "flip"), lambda items, _: items[::-1]),
    Operation(("sort", "order"), lambda items, _: sorted(items)),
    Operation(("drop", "skip"), lambda items, k: items[k:], range(1, 4)),
    Operation(("add", "raise"), lambda items, k: [(x + k) % 10 for x in items], range(1, 6)),
    Operation(("rotate",), lambda items, _: items[1:] + items[:1]),
    Operation(("take", "keep"), lambda items, k: items[:k], range(3, 7)),
    Operation(("descending",), lambda items, _: sorted(items, reverse=True)),
    Operation(("above", "over"), lambda items, k: [x for x in items if x > k], range(1, 5)),
    Operation(("complement",), lambda items, _: [9 - x for x in items]),
    Operation(("even",), lambda items, _: [x for x in items if x % 2 == 0]),
    Operation(("below",), lambda items, k: [x for x in items if x < k], range(5, 9)),
    Operation(("odd",), lambda items, _: [x for x in items if x % 2 == 1]),
)


@dataclass(frozen=True)
class Question:
    """A number asked of a list, under its names, the most common one first."""

    names: tuple[str, ...]
    answer: Callable[[Items], int]


QUESTIONS = (
    Question(("sum", "total"), sum),
    Question(("ends",), lambda items: items[0] * items[-1]),
    Question(("max", "largest"), max),
    Question(("count", "length"), len),
    Question(("last", "end"), lambda items: items[-1]),
    Question(("min", "smallest"), min),
)


@dataclass(frozen=True)
class Mixture:
    """How often each choice is drawn (weights, not normalised)."""

    rank_exponent: float
    """Of the Zipf weights of operations and names."""
    length_weights: tuple[float, ...]
    """For lists of 4, 5, ... 8 different digits."""
    step_weights: tuple[float, ...]
    """For 1, 2, 3 and 4 operations."""


CORPUS = Mixture(
    rank_exponent=1.2,
    length_weights=(4, 4, 3, 2, 1),
    step_weights=(4, 3, 2, 1),
)
POOL = Mixture(
    rank_exponent=0.5,
    length_weights=(1, 1, 2, 2, 2),
    step_weights=(2, 3, 3, 2),
)


@dataclass(frozen=True)
class Pipeline(Problem):
    """A pipeline; its working has the list after each operation."""

    length: int
    steps: int


def draw_pipeline(rng: random.Random, mixture: Mixture) -> Pipeline:
    """One pipeline of the mixture."""
    length = rng.choices(range(4, 9), mixture.length_weights)[0]
    steps = rng.choices(range(1, 5), mixture.step_weights)[0]
    items = rng.sample(range(10), length)
    prompt, working = [f"list {_spaced(items)} :"], []
    for _ in range(steps):
        text, name, items = _draw_operation(rng, mixture, items)
        prompt.append(text)
        working.append(f"{name} {_spaced(items)}")
    question = _draw_ranked(rng, QUESTIONS, mixture.rank_exponent)
    name = _draw_ranked(rng, question.names, mixture.rank_exponent)
    answer = question.answer(items)
    last = " , ".join(map(str, accumulate(items))) if question.answer is sum else answer
    return Pipeline(
        prompt=" ".join([*prompt, f"{name} ="]),
        working=" ".join([*working, f"{name} {last}"]),
        answer=answer,
        length=length,
        steps=steps,
    )


def _draw_operation(rng: random.Random, mixture: Mixture, items: Items) -> tuple[str, str, Items]:
    """Text and name of an operation that leaves something of the list, and what it leaves."""
    while True:
        operation = _draw_ranked(rng, OPERATIONS, mixture.rank_exponent)
        name = _draw_ranked(rng, operation.names, mixture.rank_exponent)
        number = rng.choice(operation.numbers) if operation.numbers else 0
        changed = operation.apply(items, number)
        if changed:
            return f"{name} {number}" if operation.numbers else name, name, changed


def _draw_ranked(rng: random.Random, choices: Sequence, exponent: float):
    return rng.choices(choices, zipf(len(choices), exponent))[0]


def _spaced(items: Items) -> str:
    return " ".join(map(str, items))


def draw_for_corpus(rng: random.Random) -> Pipeline:
    """One pipeline of what the base model is trained on."""
    return draw_pipeline(rng, CORPUS)


def draw_for_pool(rng: random.Random) -> Pipeline:
    """One pipeline of what reinforcement learning and evaluation use."""
    return draw_pipeline(rng, POOL)


def words() -> set[str]:
    """Every word of a pipeline and the sign between running totals."""
    names = {name for choice in (*OPERATIONS, *QUESTIONS) for name in choice.names}
    return names | {"list", ":", "=", ","}
