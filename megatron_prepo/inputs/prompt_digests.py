"""What the prompts of a run became as tokens: digests, and the date of the chat template.

Some chat templates write today's date into every prompt (Llama 3.2's), others change with the
tokenizer's files or the version of `transformers`.  A run keeps `prompts.json` from its first
start: the date, which a resumed run takes again, and a digest of each prompt's id, tokens and
answer, which have to be the same whenever it starts, and on all ranks.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from megatron_prepo.config import Config
from megatron_prepo.errors import UserError
from megatron_prepo.files.atomic import write_text
from megatron_prepo.records import Prompt

FILE = "prompts.json"
DIGITS = 8
"""Hexadecimal, of each prompt."""
CAUSES = "the file, the tokenizer of model.hf, or the version of transformers"
Day = date
"""The type, where a field is called `date`."""


@dataclass(frozen=True)
class PromptDigests:
    """Of the prompts that one process has read."""

    date: str | None
    """What the chat template was told of today, ISO 8601; None without a chat template."""
    files: dict[str, str]
    """By setting (`data.train`), the digests of its prompts in their order."""
    paths: dict[str, str]
    """By setting, the file."""
    ids: dict[str, list[str]]
    """By setting, the prompts' ids."""

    @classmethod
    def of(
        cls, config: Config, day: Day | None, prompts: dict[str, Sequence[Prompt]]
    ) -> "PromptDigests":
        """Of all prompts of `train` and `eval`."""
        tree = vars(config.data)
        return cls(
            None if day is None else day.isoformat(),
            {f"data.{name}": "".join(map(_digest, of_file)) for name, of_file in prompts.items()},
            {f"data.{name}": tree[name] for name in prompts},
            {f"data.{name}": [p.id for p in of_file] for name, of_file in prompts.items()},
        )

    @property
    def summed(self) -> str:
        """One digest of all."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    def difference(self, files: dict[str, str]) -> str | None:
        """Name the first of these prompts that others' digests differ in; None if none does."""
        for name, digests in self.files.items():
            where = f"{name}={self.paths[name]}"
            mine, others = _cut(digests), _cut(files[name])
            if len(mine) != len(others):
                return f"{where} has {len(mine):,} prompts, not {len(others):,}"
            odd = [i for i, pair in enumerate(zip(mine, others, strict=True)) if pair[0] != pair[1]]
            if odd:
                more = f" (and {len(odd) - 1:,} more)" if odd[1:] else ""
                first = self.ids[name][odd[0]]
                return f"{where}: prompt {first!r}{more} has other tokens, or another answer"
        return None


def template_date(config: Config) -> date | None:
    """What the chat template is told of today: as set, as at the run's first start, or today."""
    if not config.data.chat_template:
        return None
    if config.data.chat_template_date is not None:
        return date.fromisoformat(config.data.chat_template_date)
    recorded = _recorded(config)
    return recorded_date(Path(config.run.dir)) if recorded else date.today()


def recorded_date(directory: Path) -> date | None:
    """The date that a run or an evaluation began with, if it has one."""
    record = read(directory)
    return date.fromisoformat(record["date"]) if record and record["date"] else None


def check_unchanged(config: Config, now: PromptDigests) -> None:
    """UserError if a run that resumes would have other prompts than it began with."""
    record = _recorded(config)
    if record and (difference := now.difference(record["files"])):
        raise UserError(
            f"run.dir={config.run.dir} began with other prompts: {difference}, than at its first "
            f"start; {CAUSES} has changed: put it back, or start a new run"
        )


def check_ranks(now: PromptDigests, gather: Callable[[Any], list[Any]]) -> None:
    """UserError naming the ranks whose prompts are not rank 0's; collective, by `gather`."""
    if len(set(gather(now.summed))) == 1:
        return
    first, *others = gather(now)
    odd = [rank for rank, other in enumerate(others, 1) if other.files != first.files]
    other = others[odd[0] - 1]
    dates = (
        "" if first.date == other.date else f", where the date is {other.date}, not {first.date}"
    )
    raise UserError(
        f"ranks {', '.join(map(str, odd))} have other prompts than rank 0: "
        f"{other.difference(first.files)}, on rank {odd[0]}{dates}; {CAUSES} differs between "
        "nodes, or the date does: set data.chat_template_date"
    )


def save(directory: Path, now: PromptDigests) -> None:
    """Keep the digests of a first start; one process does it."""
    if not (directory / FILE).exists():
        write_text(directory / FILE, json.dumps({"date": now.date, "files": now.files}) + "\n")


def read(directory: Path) -> dict[str, Any] | None:
    """What was kept; None if nothing was."""
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"date": record["date"], "files": dict(record["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}): put it back, or start a new run"
        ) from error


def _recorded(config: Config) -> dict[str, Any] | None:
    """Return that of the run in `run.dir`, if there is one and these settings do not replace it."""
    return None if config.run.overwrite else read(Path(config.run.dir))


def _digest(prompt: Prompt) -> str:
    words = json.dumps([prompt.id, prompt.answer]).encode()
    return hashlib.sha256(words + array("q", prompt.tokens).tobytes()).hexdigest()[:DIGITS]


def _cut(digests: str) -> list[str]:
    return [digests[i : i + DIGITS] for i in range(0, len(digests), DIGITS)]
