"""Register programs: a loop of instructions on two registers, executed with the state written out.

    prompt    mod 10 a 3 b 7 repeat 2 add swap print a :
    worked    2 add 0 , 7 swap 7 , 0 | 1 add 7 , 0 swap 0 , 7 | #### 0
    direct    #### 0

The body is repeated as often as the number after ``repeat`` says; the worked answer has one round
per repetition: how many are left, then each instruction with ``a , b`` after it. All results are
taken modulo the number after ``mod``, so that no register is negative.

``CORPUS`` is what the base model is trained on: few instructions and short runs are common, rare
instructions are rare. ``POOL`` is what reinforcement learning and evaluation use: longer runs and
rarer instructions. How long a program runs does not show in the length of its text.
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
    "copy": lambda a, b: (a, a),
    "dec": lambda a, b: (a - 1, b),
    "max": lambda a, b: (max(a, b), b),
    "sub": lambda a, b: (a - b, b),
    "min": lambda a, b: (min(a, b), b),
    "triple": lambda a, b: (3 * a, b),
    "neg": lambda a, b: (-a, b),
    "gap": lambda a, b: (abs(a - b), b),
}
MODULI = (10, 20, 30)
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
    instruction_weights=zipf(len(INSTRUCTIONS), 1.0),
    modulus_weights=(0.6, 0.27, 0.13),
    body_weights=(0.2, 0.35, 0.3, 0.15),
    executed=(4, 15),
)
POOL = Mixture(
    instruction_weights=zipf(len(INSTRUCTIONS), 0.5),
    modulus_weights=(0.4, 0.35, 0.25),
    body_weights=(0.1, 0.3, 0.35, 0.25),
    executed=(9, 15),
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
    body = rng.choices(list(INSTRUCTIONS), mixture.instruction_weights, k=size)
    rounds = min(MAX_ROUNDS, max(1, rng.randint(*mixture.executed) // size))
    a, b = rng.randrange(modulus), rng.randrange(modulus)
    register = rng.choices("ab", (2, 1))[0]
    prompt = f"mod {modulus} a {a} b {b} repeat {rounds} {' '.join(body)} print {register} :"

    working = []
    for left in range(rounds, 0, -1):
        working.append(str(left))
        for name in body:
            a, b = (value % modulus for value in INSTRUCTIONS[name](a, b))
            working.append(f"{name} {a} , {b}")
        working.append("|")
    return Program(
        prompt=prompt,
        working=" ".join(working),
        answer=a if register == "a" else b,
        modulus=modulus,
        body=size,
        executed=rounds * size,
    )


def draw_for_corpus(rng: random.Random) -> Program:
    """One program of what the base model is trained on."""
    return draw_program(rng, CORPUS)


def draw_for_pool(rng: random.Random) -> Program:
    """One program of what reinforcement learning and evaluation use."""
    return draw_program(rng, POOL)


def words() -> set[str]:
    """Every word of a program and the signs of its trace."""
    return {*INSTRUCTIONS, "mod", "a", "b", "repeat", "print", ":", ",", "|"}
