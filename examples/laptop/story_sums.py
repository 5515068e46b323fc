"""Story sums: a small GSM8K-like task with verifiable answers and known working.

A story starts with a number, changes it one to five times (gain, loss, doubling, halving) and asks
for the final number:

    prompt    tom has 9 apples . tom buys 4 more . tom gives 5 away .
              how many apples does tom have ? answer :
    worked    9 + 4 = 13 - 5 = 8 #### 8
    direct    #### 8

Two mixtures are drawn from the same generator. The base model is trained on ``CORPUS``: mostly
short stories of a few common families, 30 % of them answered directly, as web text mixes styles.
Reinforcement learning and evaluation use ``POOL``: longer stories, larger numbers, rarer families.
So the base model solves some prompts always, some never and most sometimes, and it can still learn
that working helps.

Deliberately excluded: negative numbers, fractions, several quantities in one story, paraphrase by a
language model, units, and any text that is not a template of this file.
"""

import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tiny_task import Problem, zipf

MAX_STEPS = 5


@dataclass(frozen=True)
class Family:
    """Sentences of one setting; ``{name}``, ``{thing}`` and ``{k}`` are filled in per story."""

    key: str
    opening: str
    gains: tuple[str, str]
    losses: tuple[str, str]
    doubling: str
    halving: str
    question: str
    things: tuple[str, ...]


@dataclass(frozen=True)
class Magnitude:
    """Limits of the numbers in a story."""

    max_operand: int
    max_total: int


@dataclass(frozen=True)
class Mixture:
    """Frequencies of families, numbers of steps and magnitudes (weights, not normalised)."""

    family_weights: tuple[float, ...]
    step_weights: tuple[float, ...]
    """Weights of 1, 2, ... MAX_STEPS steps."""
    magnitude_weights: tuple[float, ...]
    """Weights of the magnitudes 1, 2, 3 and 4, as far as given."""


@dataclass(frozen=True)
class Story(Problem):
    """A story; its working is the running line, e.g. ``9 + 4 = 13 - 5 = 8``."""

    family: str
    steps: int
    magnitude: int


# The order is the rank in the Zipf mixtures below: the first family is the most common one.
FAMILIES = (
    Family(
        key="shopping",
        opening="{name} has {k} {thing} .",
        gains=("{name} buys {k} more .", "{name} finds {k} more ."),
        losses=("{name} gives {k} away .", "{name} loses {k} ."),
        doubling="then {name} doubles the {thing} .",
        halving="then {name} sells half of the {thing} .",
        question="how many {thing} does {name} have ?",
        things=("apples", "pens", "coins", "books", "marbles", "stickers", "shells", "stamps"),
    ),
    Family(
        key="bus",
        opening="there are {k} people on a bus .",
        gains=("{k} people get on .", "at the stop {k} more get on ."),
        losses=("{k} people get off .", "at the stop {k} get off ."),
        doubling="the number of people doubles .",
        halving="half of the people get off .",
        question="how many people are on the bus ?",
        things=("people",),
    ),
    Family(
        key="savings",
        opening="{name} saves {k} dollars .",
        gains=("{name} earns {k} dollars .", "a gift adds {k} dollars ."),
        losses=("{name} spends {k} dollars .", "a ticket costs {k} dollars ."),
        doubling="the bank doubles the money .",
        halving="{name} spends half of the money .",
        question="how much money is left ?",
        things=("dollars",),
    ),
    Family(
        key="farm",
        opening="a farm keeps {k} {thing} .",
        gains=("{k} {thing} are born .", "the farmer brings {k} {thing} ."),
        losses=("{k} {thing} run away .", "the farmer sells {k} {thing} ."),
        doubling="the herd doubles .",
        halving="half of the herd is sold .",
        question="how many {thing} are on the farm ?",
        things=("cows", "sheep", "goats", "ducks", "pigs"),
    ),
    Family(
        key="library",
        opening="a library shelf holds {k} novels .",
        gains=("readers return {k} novels .", "the library orders {k} novels ."),
        losses=("readers borrow {k} novels .", "{k} novels are damaged ."),
        doubling="a donor doubles the shelf .",
        halving="half of the shelf is moved .",
        question="how many novels remain on the shelf ?",
        things=("novels",),
    ),
    Family(
        key="score",
        opening="team {name} scored {k} points .",
        gains=("in the next round they win {k} points .", "a bonus brings {k} points ."),
        losses=("a penalty takes {k} points .", "a foul removes {k} points ."),
        doubling="the judge doubles their score .",
        halving="the judge halves their score .",
        question="what is the final score ?",
        things=("points",),
    ),
    Family(
        key="bakery",
        opening="a baker made {k} {thing} in the morning .",
        gains=(
            "at noon the baker makes {k} extra {thing} .",
            "the oven yields another {k} {thing} .",
        ),
        losses=("customers bought {k} {thing} .", "the baker burned {k} {thing} ."),
        doubling="the baker repeats the whole batch once .",
        halving="half of the {thing} go to a cafe .",
        question="how many {thing} are unsold ?",
        things=("cakes", "muffins", "rolls", "pies"),
    ),
    Family(
        key="thermometer",
        opening="the thermometer reads {k} degrees .",
        gains=("by afternoon it rises {k} degrees .", "sunshine warms it by {k} degrees ."),
        losses=("overnight it drops {k} degrees .", "wind cools it by {k} degrees ."),
        doubling="inside the greenhouse the reading doubles .",
        halving="in the cellar the reading halves .",
        question="what does the thermometer read now ?",
        things=("degrees",),
    ),
    Family(
        key="lift",
        opening="a lift stands on floor {k} of a tower .",
        gains=("it climbs {k} floors .", "going up it passes {k} floors ."),
        losses=("it descends {k} floors .", "going down it passes {k} floors ."),
        doubling="it goes up to twice its level .",
        halving="it goes down to half its level .",
        question="on which floor does the lift stop ?",
        things=("floors",),
    ),
    Family(
        key="tank",
        opening="a tank contains {k} litres of water .",
        gains=("rain pours in {k} litres .", "a pump supplies {k} litres ."),
        losses=("a leak wastes {k} litres .", "the garden needs {k} litres ."),
        doubling="the flood leaves twice as much .",
        halving="evaporation leaves only half .",
        question="how many litres does the tank contain ?",
        things=("litres",),
    ),
    Family(
        key="ship",
        opening="captain {name} sailed with {k} sailors aboard .",
        gains=("at the harbour {k} sailors joined .", "{k} castaways were rescued ."),
        losses=("{k} sailors deserted the ship .", "a storm swept {k} overboard ."),
        doubling="another crew of equal size joined .",
        halving="half the crew mutinied and left .",
        question="what was the size of the crew ?",
        things=("sailors",),
    ),
    Family(
        key="chemist",
        opening="a chemist weighs {k} grams of salt .",
        gains=("she dissolves {k} further grams .", "a second sample contributes {k} grams ."),
        losses=("filtering discards {k} grams .", "the reaction consumes {k} grams ."),
        doubling="an identical portion is combined with it .",
        halving="exactly one half is discarded .",
        question="what mass of salt results ?",
        things=("grams",),
    ),
)
# fmt: off
NAMES = (
    "tom", "anna", "ben", "mia", "sam", "lily", "jack", "emma", "leo",
    "zoe", "max", "ruby", "omar", "nina", "ivan", "priya", "hugo", "wei",
)
# fmt: on
DISTRACTORS = (
    "{name} is {k} years old .",
    "it takes {k} minutes .",
    "{name} has {k} friends .",
)
MAGNITUDES = {
    1: Magnitude(9, 20),
    2: Magnitude(15, 50),
    3: Magnitude(30, 99),
    4: Magnitude(300, 999),
}
OPERATIONS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}


CORPUS = Mixture(
    family_weights=zipf(len(FAMILIES), 1.0),
    step_weights=zipf(MAX_STEPS, 1.3),
    magnitude_weights=(0.55, 0.35, 0.10),
)
POOL = Mixture(
    family_weights=zipf(len(FAMILIES), 0.5),
    step_weights=(1.0,) * MAX_STEPS,
    magnitude_weights=(0.4, 0.4, 0.2),
)
BEYOND = Mixture(
    family_weights=zipf(len(FAMILIES), 0.5),
    step_weights=(0.0, 0.0, 1.0, 1.0, 1.0),
    magnitude_weights=(0.0, 0.0, 0.0, 1.0),
)
DISTRACTOR_SHARE = 0.1
SCALING_SHARE = 0.12  # share of steps, if the numbers allow it: half doublings, half halvings


def draw_story(rng: random.Random, mixture: Mixture) -> Story:
    """Draw one story from a mixture."""
    family = rng.choices(FAMILIES, mixture.family_weights)[0]
    steps = rng.choices(range(1, MAX_STEPS + 1), mixture.step_weights)[0]
    magnitude = rng.choices(
        range(1, len(mixture.magnitude_weights) + 1), mixture.magnitude_weights
    )[0]
    limits = MAGNITUDES[magnitude]
    words = {"name": _draw_common(rng, NAMES), "thing": _draw_common(rng, family.things)}

    total = rng.randint(2, limits.max_operand)
    sentences = [family.opening.format(k=total, **words)]
    working = str(total)
    for _ in range(steps):
        symbol, operand = _draw_operation(rng, total, limits)
        total = OPERATIONS[symbol](total, operand)
        sentences.append(_draw_sentence(rng, family, symbol).format(k=operand, **words))
        working += f" {symbol} {operand} = {total}"
    if rng.random() < DISTRACTOR_SHARE:
        place = rng.randint(1, len(sentences))
        sentences.insert(place, _draw_distractor(rng, limits))
    sentences.append(family.question.format(**words))

    return Story(
        prompt=" ".join(sentences) + " answer :",
        working=working,
        answer=total,
        family=family.key,
        steps=steps,
        magnitude=magnitude,
    )


def _draw_common(rng: random.Random, words: Sequence[str]) -> str:
    return rng.choices(words, zipf(len(words), 0.8))[0]


def _draw_operation(rng: random.Random, total: int, limits: Magnitude) -> tuple[str, int]:
    """Draw a symbol and an operand that keep the total in 1 ... ``max_total``."""
    draw = rng.random()
    if draw < SCALING_SHARE / 2 and 2 * total <= limits.max_total:
        return "*", 2
    if draw < SCALING_SHARE and total % 2 == 0 and total > 2:
        return "/", 2
    goes_up = rng.random() < 0.5
    if total == limits.max_total:
        goes_up = False
    if total < 3:
        goes_up = True
    room = limits.max_total - total if goes_up else total - 1
    return "+" if goes_up else "-", rng.randint(1, min(limits.max_operand, room))


def _draw_sentence(rng: random.Random, family: Family, symbol: str) -> str:
    if symbol == "*":
        return family.doubling
    if symbol == "/":
        return family.halving
    return rng.choices(family.gains if symbol == "+" else family.losses, (2, 1))[0]


def _draw_distractor(rng: random.Random, limits: Magnitude) -> str:
    """Draw a line of the story with a number that is irrelevant to the question."""
    template = rng.choices(DISTRACTORS, (3, 2, 1))[0]
    return template.format(name=rng.choice(NAMES), k=rng.randint(2, limits.max_operand))


def draw_for_corpus(rng: random.Random) -> Story:
    """Draw one story for training the base model."""
    return draw_story(rng, CORPUS)


def draw_for_pool(rng: random.Random) -> Story:
    """Draw one story for reinforcement learning and evaluation."""
    return draw_story(rng, POOL)


def draw_beyond(rng: random.Random) -> Story:
    """Draw one story that the base model cannot do."""
    return draw_story(rng, BEYOND)


def words() -> set[str]:
    """Return every word of the templates and the signs of the working."""
    templates = [*DISTRACTORS]
    for family in FAMILIES:
        templates += [family.opening, *family.gains, *family.losses]
        templates += [family.doubling, family.halving, family.question, *family.things]
    found = {word for template in templates for word in template.split()}
    found -= {"{name}", "{thing}", "{k}"}
    return found | {*NAMES, *OPERATIONS, "=", "answer", ":"}
