"""Texts that a run keeps for its report: one JSON line per step, and one per evaluation.

| file | line |
|---|---|
| `texts/rollouts.jsonl` | a step: perplexities of its candidates, and rollouts of some prompts |
| `texts/evaluations.jsonl` | an evaluation: completions of some held-out prompts |

`docs/training.md` lists the fields.  A step is in one line, so that it is kept completely or not at
all; lines after the step that a run resumes from are removed with those of the other logs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias

from megatron_prepo.config import TextsConfig
from megatron_prepo.files.atomic import append

Kind: TypeAlias = Literal["rollouts", "evaluations"]

FOLDER = "texts"
ENTROPY_DIGITS = 4
"""Decimals of a token's entropy in nats: enough for a colour, and half the bytes."""

COLUMNS: dict[Kind, tuple[str, tuple[str, ...]]] = {
    "rollouts": (
        "rollouts",
        ("reward", "tokens", "finished", "advantage", "weight", "mean_entropy"),
    ),
    "evaluations": ("completions", ("reward", "tokens", "finished")),
}
"""Name of a prompt's completions in a line, and of their values that dashboards show."""


def file_name(kind: Kind) -> str:
    """Return the path of a file within the run's directory."""
    return f"{FOLDER}/{kind}.jsonl"


def spread(total: int, count: int | None) -> list[int]:
    """Return `count` of the positions 0 to total - 1, evenly spread, with both ends; None: all.

    >>> spread(10, 4), spread(10, 1), spread(3, 8), spread(3, None), spread(3, 0)
    ([0, 3, 6, 9], [4], [0, 1, 2], [0, 1, 2], [])
    """
    if count is None or count >= total:
        return list(range(total))
    if count == 1:
        return [(total - 1) // 2]
    return [i * (total - 1) // (count - 1) for i in range(count)]


def rows(kind: Kind, line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a line as rows of a table by column, one per completion, for dashboards.

    Their texts are UTF-8, which half a surrogate pair is not.
    """
    completions, numbers = COLUMNS[kind]
    return [
        {
            "id": prompt["id"],
            **{name: completion[name] for name in numbers},
            "answer": _utf8(prompt["answer"]),
            "prompt": _utf8(prompt["text"]),
            "completion": _utf8(completion["text"]),
        }
        for prompt in line["prompts"]
        for completion in prompt[completions]
    ]


def _utf8(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")


class TextFiles:
    """The files of the kinds to keep, and those that exist from before a resume; rank 0 only."""

    def __init__(self, directory: Path, settings: TextsConfig) -> None:
        wanted: dict[Kind, int | None] = {
            "rollouts": settings.rollouts,
            "evaluations": settings.evaluations,
        }
        self.files: dict[str, TextIO] = {}
        """Open files, by their path within the run's directory."""
        for kind, count in wanted.items():
            path = directory / file_name(kind)
            if count != 0 or path.exists():
                path.parent.mkdir(exist_ok=True)
                self.files[file_name(kind)] = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def append(self, kind: Kind, line: Mapping[str, Any]) -> None:
        """Write a line; it is on disk when the method returns."""
        # ASCII, since a completion may hold half a surrogate pair
        append(self.files[file_name(kind)], json.dumps(line, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()
