"""List pipelines: a short list of digits, modified step by step, and a question about the result.

    prompt    list 3 1 4 5 : sort rotate ends =
    worked    sort 1 3 4 5 rotate 3 4 5 1 ends 3 1 #### 3 1
    direct    #### 3 1

The worked answer writes the list after every operation. A question asks for two digits of the
resulting list: the first and the last one, the first two, or the last two. All digits of a list
differ, and so do the operations of a pipeline. Most operations and all questions have two names,
the second of which is rarer.

The base model is trained on ``CORPUS``: short pipelines of common operations under their common
names. Reinforcement learning and evaluation use ``POOL``: longer lists and pipelines, rarer
operations and names.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tiny_task import Problem, zipf

Items = list[int]


@dataclass(frozen=True)
class Operation:
    """An operation on a list with its names, the most common one first."""

    names: tuple[str, ...]
    apply: Callable[[Items], Items]


# The order is the rank in the Zipf mixtures below: the first operation is the most common one.
OPERATIONS = (
    Operation(("reverse", "flip"), lambda items: items[::-1]),
    Operation(("sort", "order"), sorted),
    Operation(("rotate", "turn"), lambda items: items[1:] + items[:1]),
    Operation(("raise", "add"), lambda items: [(x + 1) % 10 for x in items]),
    Operation(("drop", "skip"), lambda items: items[1:]),
    Operation(("descending",), lambda items: sorted(items, reverse=True)),
    Operation(("complement", "mirror"), lambda items: [9 - x for x in items]),
    Operation(("pop", "cut"), lambda items: items[:-1]),
    Operation(("lower",), lambda items: [(x - 1) % 10 for x in items]),
    Operation(("shift",), lambda items: items[-1:] + items[:-1]),
)


@dataclass(frozen=True)
class Question:
    """A number computed from a list with its names, the most common one first."""

    names: tuple[str, ...]
    answer: Callable[[Items], int]


QUESTIONS = (
    Question(("ends", "edges"), lambda items: 10 * items[0] + items[-1]),
    Question(("front", "start"), lambda items: 10 * items[0] + items[1]),
    Question(("back", "tail"), lambda items: 10 * items[-2] + items[-1]),
)


@dataclass(frozen=True)
class Mixture:
    """Frequencies of the choices (weights, not normalised)."""

    rank_exponent: float
    """Exponent of the Zipf weights of operations and names."""
    length_weights: tuple[float, ...]
    """Weights of lists of 4, 5, 6, ... different digits."""
    step_weights: tuple[float, ...]
    """Weights of 1, 2, 3, ... operations."""


CORPUS = Mixture(
    rank_exponent=1.5,
    length_weights=(3, 4, 2, 1),
    step_weights=(3, 4, 2, 1),
)
POOL = Mixture(
    rank_exponent=0.6,
    length_weights=(1, 3, 3, 2),
    step_weights=(1, 3, 3, 2),
)


BEYOND = Mixture(
    rank_exponent=0.0,
    length_weights=(0, 0, 0, 0, 1, 1),
    step_weights=(0, 0, 0, 0, 1, 1),
)


@dataclass(frozen=True)
class Pipeline(Problem):
    """A pipeline; its working has the list after each operation."""

    length: int
    steps: int


def draw_pipeline(rng: random.Random, mixture: Mixture) -> Pipeline:
    """Draw one pipeline from a mixture."""
    length = rng.choices(range(4, 4 + len(mixture.length_weights)), mixture.length_weights)[0]
    steps = rng.choices(range(1, 1 + len(mixture.step_weights)), mixture.step_weights)[0]
    items = rng.sample(range(10), length)
    prompt, working = [f"list {_spaced(items)} :"], []
    done: set[Operation] = set()
    while len(done) < steps:
        operation = _draw_ranked(rng, OPERATIONS, mixture.rank_exponent)
        if operation in done:
            continue
        done.add(operation)
        items = operation.apply(items)
        name = _draw_ranked(rng, operation.names, mixture.rank_exponent)
        prompt.append(name)
        working.append(f"{name} {_spaced(items)}")
    question = _draw_ranked(rng, QUESTIONS, mixture.rank_exponent)
    name = _draw_ranked(rng, question.names, mixture.rank_exponent)
    answer = question.answer(items)
    return Pipeline(
        prompt=" ".join([*prompt, f"{name} ="]),
        working=" ".join([*working, f"{name} {answer}"]),
        answer=answer,
        length=length,
        steps=steps,
    )


def _draw_ranked(rng: random.Random, choices: Sequence, exponent: float):
    return rng.choices(choices, zipf(len(choices), exponent))[0]


def _spaced(items: Items) -> str:
    return " ".join(map(str, items))


def draw_for_corpus(rng: random.Random) -> Pipeline:
    """Draw one pipeline for training the base model."""
    return draw_pipeline(rng, CORPUS)


def draw_for_pool(rng: random.Random) -> Pipeline:
    """Draw one pipeline for reinforcement learning and evaluation."""
    return draw_pipeline(rng, POOL)


def draw_beyond(rng: random.Random) -> Pipeline:
    """Draw one pipeline that the base model cannot do, without sorting: its ends can be guessed."""
    while True:
        pipeline = draw_pipeline(rng, BEYOND)
        if not {"sort", "order", "descending"} & set(pipeline.prompt.split()):
            return pipeline


def words() -> set[str]:
    """Return every word of a pipeline and the sign between running totals."""
    names = {name for choice in (*OPERATIONS, *QUESTIONS) for name in choice.names}
    return names | {"list", ":", "=", ","}
