"""Register programs: a loop of instructions on two registers, executed with the state written out.

    prompt    mod 10 a 3 b 7 repeat 2 add swap print
    worked    2 add a 0 b 7 swap a 7 b 0 | 1 add a 7 b 0 swap a 0 b 7 | #### 7
    direct    #### 7

The body, of different instructions, is repeated as often as the number after ``repeat`` says; the
worked answer has one round per repetition: how many are left, then each instruction with the state
after it. All results are taken modulo the number after ``mod``, so that a register is one digit.
The answer is ``10 * a + b``: a guess has to get both registers right.

``CORPUS`` is what the base model is trained on: few instructions, the modulus 10 and short runs are
common, the rest is rare. ``POOL`` is what reinforcement learning and evaluation use: longer runs
and rarer instructions and moduli. How long a program runs does not show in the length of its text.
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
    """How often each choice is drawn (weights, not normalised)."""

    instruction_weights: tuple[float, ...]
    modulus_weights: tuple[float, ...]
    body_weights: tuple[float, ...]
    """For a body of 1, 2, ... MAX_BODY instructions."""
    executed: tuple[int, int]
    """Bounds of the number of instructions to execute; rounds are whole, so it is not exact."""


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


@dataclass(frozen=True)
class Program(Problem):
    """A program; its working is the trace."""

    modulus: int
    body: int
    executed: int


def draw_program(rng: random.Random, mixture: Mixture) -> Program:
    """One program of the mixture."""
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
    """Different instructions: which one comes next in a trace is told by the last one."""
    body: dict[str, None] = {}
    while len(body) < size:
        body[rng.choices(list(INSTRUCTIONS), mixture.instruction_weights)[0]] = None
    return list(body)


def draw_for_corpus(rng: random.Random) -> Program:
    """One program of what the base model is trained on."""
    return draw_program(rng, CORPUS)


def draw_for_pool(rng: random.Random) -> Program:
    """One program of what reinforcement learning and evaluation use."""
    return draw_program(rng, POOL)


def words() -> set[str]:
    """Every word of a program and the signs of its trace."""
    return {*INSTRUCTIONS, "mod", "a", "b", "repeat", "print", "|"}
