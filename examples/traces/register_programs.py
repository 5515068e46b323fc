"""Register programs: a loop of instructions on two registers, executed with the state written out.

    prompt    mod 10 a 3 b 7 repeat 2 add swap print
    worked    2 add a 0 b 7 swap a 7 b 0 | 1 add a 7 b 0 swap a 0 b 7 | #### 7
    direct    #### 7

The body, of different instructions, is repeated by the number after ``repeat``; the worked answer
has one round per repetition: the remaining repetitions, then each instruction with the state after
it. All results are taken modulo the number after ``mod``, so that a register is one digit. The
answer is ``10 * a + b``: a guess must get both registers right.

The base model is trained on ``CORPUS``: few instructions, the modulus 10 and short runs are common,
all else is rare. Reinforcement learning and evaluation use ``POOL``: longer runs and rarer
instructions and moduli. The length of a program's text does not show how long it runs.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from tiny_task import Problem, zipf

State = tuple[int, int]

# The order is the rank in the Zipf mixtures below: the first instruction is the most common one.
INSTRUCTIONS: dict[str, Callable[[int, int], State]] = {
    "add": lambda a, b: (a + b, b),
    "swap": lambda a, b: (b, a),
    "inc": lambda a, b: (a + 1, b),
    "double": lambda a, b: (2 * a, b),
    "push": lambda a, b: (a, a + b),
    "dec": lambda a, b: (a - 1, b),
    "sub": lambda a, b: (a - b, b),
    "copy": lambda a, b: (a, a),
    "cross": lambda a, b: (b, a + b),
    "triple": lambda a, b: (3 * a, b),
    "turn": lambda a, b: (-b, a),
    "gap": lambda a, b: (abs(a - b), b),
}
MODULI = (10, 8, 9, 7)
MAX_BODY = 4
MAX_ROUNDS = 9


@dataclass(frozen=True)
class Mixture:
    """Frequencies of the choices (weights, not normalised)."""

    instruction_weights: tuple[float, ...]
    modulus_weights: tuple[float, ...]
    body_weights: tuple[float, ...]
    """Weights of a body of 1, 2, ... MAX_BODY instructions."""
    executed: tuple[int, int]
    """Bounds of the number of executed instructions, approximate since rounds are complete."""


CORPUS = Mixture(
    instruction_weights=zipf(len(INSTRUCTIONS), 2.0),
    modulus_weights=zipf(len(MODULI), 2.0),
    body_weights=(0.2, 0.35, 0.3, 0.15),
    executed=(3, 14),
)
POOL = Mixture(
    instruction_weights=zipf(len(INSTRUCTIONS), 0.5),
    modulus_weights=zipf(len(MODULI), 0.5),
    body_weights=(0.1, 0.35, 0.35, 0.2),
    executed=(9, 14),
)


BEYOND = Mixture(
    # only instructions that lose nothing: the state, and so the answer, cannot be guessed
    instruction_weights=tuple(
        0.0 if name in ("double", "copy", "triple", "gap") else 1.0 for name in INSTRUCTIONS
    ),
    modulus_weights=(1.0,) * len(MODULI),
    body_weights=(0.0, 0.0, 1.0, 1.0),
    executed=(20, 36),
)


@dataclass(frozen=True)
class Program(Problem):
    """A program, with the trace as its working."""

    modulus: int
    body: int
    executed: int


def draw_program(rng: random.Random, mixture: Mixture) -> Program:
    """Draw one program from a mixture."""
    modulus = rng.choices(MODULI, mixture.modulus_weights)[0]
    size = rng.choices(range(1, MAX_BODY + 1), mixture.body_weights)[0]
    body = _draw_body(rng, mixture, size)
    rounds = min(MAX_ROUNDS, max(1, rng.randint(*mixture.executed) // size))
    a, b = rng.randrange(modulus), rng.randrange(modulus)
    prompt = f"mod {modulus} a {a} b {b} repeat {rounds} {' '.join(body)} print"

    working = []
    for left in range(rounds, 0, -1):
        working.append(str(left))
        for name in body:
            a, b = (value % modulus for value in INSTRUCTIONS[name](a, b))
            working.append(f"{name} a {a} b {b}")
        working.append("|")
    return Program(
        prompt=prompt,
        working=" ".join(working),
        answer=10 * a + b,
        modulus=modulus,
        body=size,
        executed=rounds * size,
    )


def _draw_body(rng: random.Random, mixture: Mixture, size: int) -> list[str]:
    """Draw different instructions, so that the last one in a trace determines the next one."""
    body: dict[str, None] = {}
    while len(body) < size:
        body[rng.choices(list(INSTRUCTIONS), mixture.instruction_weights)[0]] = None
    return list(body)


def draw_for_corpus(rng: random.Random) -> Program:
    """Draw one program for training the base model."""
    return draw_program(rng, CORPUS)


def draw_for_pool(rng: random.Random) -> Program:
    """Draw one program for reinforcement learning and evaluation."""
    return draw_program(rng, POOL)


def draw_beyond(rng: random.Random) -> Program:
    """Draw one program that the base model cannot run."""
    return draw_program(rng, BEYOND)


def words() -> set[str]:
    """Return every word of a program and the signs of its trace."""
    return {*INSTRUCTIONS, "mod", "a", "b", "repeat", "print", "|"}
