"""Tasks of reasoning-gym, graded by the library's own `score_answer`.

A prompt's line has an object `reasoning_gym` with what scoring needs (`tools/data/prepare.py
reasoning-gym` writes it): `version` of the library, `dataset`, `parameters` that differ from the
dataset's defaults, and the `entry` that the library generated.

`final_answer.py` finds the answer in a completion; where the entry's own answer is a number, the
last number of that counts.
"""

import ast
import datetime
import enum
import functools
import importlib.metadata
import json
import re
import sys
from dataclasses import dataclass, fields
from typing import Any

import reasoning_gym  # noqa: F401 - registers the datasets
from reasoning_gym.factory import DATASETS

from megatron_prepo.rewards.final_answer import final_answer, is_number, last_number

LIBRARY = "reasoning-gym"
INSTALLED = importlib.metadata.version(LIBRARY)
LITERALS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
"""Datasets whose `score_answer` runs an answer as Python to read a list."""
EXPRESSIONS = (
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
)
"""Datasets whose `score_answer` has sympy parse an answer, which runs it as Python."""
MATHEMATICS = re.compile(r"[a-z]|abs|a?(cos|sin|tan)h?|cot|csc|sec|exp|ln|log|pi|sqrt", re.I)
"""Words of a harmless expression."""
BOARDS = ("arc_agi", "rearc")
"""Datasets that compare with a tuple of tuples, which JSON does not have."""


@dataclass(frozen=True)
class Task:
    """The object `reasoning_gym` of a prompt's line."""

    version: str
    dataset: str
    parameters: dict[str, Any]
    entry: dict[str, Any]


def task_score(completion: str, *, record: dict[str, Any]) -> dict[str, float]:
    """Return the library's score of a completion, 0 to 1, also under the name of its dataset.

    Raises ValueError for a line of another tool, or of another version of the library.
    """
    task = _task(record)
    answer, expected = final_answer(completion), task.entry["answer"]
    if expected is not None and is_number(expected):
        answer = last_number(answer)
    score = float(score_of(answer, task))
    return {"reward": score, task.dataset: score}


def score_of(answer: str, task: Task) -> float:
    """Return the library's score of an answer."""
    dataset = task_dataset(task.dataset, json.dumps(task.parameters, sort_keys=True))
    score: float = dataset.score_answer(_harmless(answer, task.dataset), task.entry)
    return score


@functools.cache
def task_dataset(name: str, parameters: str) -> Any:
    """Return the library's dataset; `parameters` as a JSON object.

    Raises ValueError, TypeError or AssertionError as the library does for wrong parameters.
    """
    dataset_class, config_class = DATASETS[name]
    if name in LITERALS:  # reads the same lists, and runs nothing
        vars(sys.modules[dataset_class.__module__])["eval"] = ast.literal_eval
    return dataset_class(config_class(**converted(name, json.loads(parameters))))


def converted(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return parameters with texts converted to the enumerations, dates and times of a dataset."""
    kinds = {field.name: type(field.default) for field in fields(DATASETS[name][1])}
    return {key: _converted(value, kinds[key]) for key, value in parameters.items()}


def _converted(value: Any, kind: type) -> Any:
    if isinstance(value, str) and issubclass(kind, enum.Enum):
        return kind(value)
    if isinstance(value, str) and issubclass(kind, datetime.date | datetime.time):
        return kind.fromisoformat(value)
    return value


def _task(record: dict[str, Any]) -> Task:
    if "reasoning_gym" not in record:
        raise ValueError(
            "the prompt's line has no field `reasoning_gym`: tools/data/prepare.py reasoning-gym "
            "writes such lines"
        )
    task = Task(**record["reasoning_gym"])
    if task.version != INSTALLED:
        raise ValueError(
            f"the prompts were written by {LIBRARY} {task.version}, but {INSTALLED} is installed "
            f"and may score differently: install {LIBRARY}=={task.version}, or write them again"
        )
    if task.dataset in BOARDS:
        board = task.entry["metadata"]["output"]
        task.entry["metadata"]["output"] = tuple(map(tuple, board))
    return task


def _harmless(answer: str, dataset: str) -> str:
    """Return an answer, or an empty text for an expression that is more than mathematics."""
    if dataset not in EXPRESSIONS:
        return answer
    words = re.findall(r"[^\W\d]\w*", answer)
    signs = re.search(r"['\"\[{;:=\\]|\.\s*[^\W\d]", answer)
    return answer if all(map(MATHEMATICS.fullmatch, words)) and not signs else ""
