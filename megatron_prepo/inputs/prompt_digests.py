"""Digests of a run's tokenized prompts, and the date of the chat template.

Some chat templates write today's date into every prompt (Llama 3.2's), and the tokens may change
with the tokenizer's files or the version of `transformers`.  At its first start a run saves
`prompts.json`: the date, which a resumed run uses again, and a digest of each prompt's id, tokens
and answer, which must be the same at every later start and on all ranks.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from megatron_prepo.config import DataConfig, RunConfig
from megatron_prepo.errors import UserError
from megatron_prepo.files.atomic import write_text
from megatron_prepo.records import Prompt

FILE = "prompts.json"
DIGITS = 8
"""Hexadecimal digits of a prompt's digest."""
CAUSES = "the file, the tokenizer of model.hf, or the version of transformers"
Day = date
"""Alias of the type, for the class with a field called `date`."""


@dataclass(frozen=True)
class PromptDigests:
    """Digests of the prompts that one process has read."""

    date: str | None
    """Today's date as given to the chat template, ISO 8601; None without a chat template."""
    files: dict[str, str]
    """The concatenated digests of the prompts, in their order, by setting (`data.train`)."""
    paths: dict[str, str]
    """The file, by setting."""
    ids: dict[str, list[str]]
    """The prompts' ids, by setting."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of skipped prompts, by setting, if any were (`data.overlong_prompts`)."""

    @classmethod
    def of(
        cls,
        files: dict[str, str],
        day: Day | None,
        prompts: Mapping[str, Sequence[Prompt]],
        dropped: dict[str, int],
    ) -> "PromptDigests":
        """Compute the digests of all prompts; all arguments but `day` are by setting."""
        return cls(
            None if day is None else day.isoformat(),
            {name: "".join(map(_digest, of_file)) for name, of_file in prompts.items()},
            files,
            {name: [prompt.id for prompt in of_file] for name, of_file in prompts.items()},
            dropped,
        )

    @property
    def summed(self) -> str:
        """A single digest of all files."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    def difference(self, files: dict[str, str]) -> str | None:
        """Describe the first prompt whose digest differs in `files`; None if all agree."""
        for name, digests in self.files.items():
            where = f"{name}={self.paths[name]}"
            mine, others = _cut(digests), _cut(files.get(name, ""))
            if len(mine) != len(others):
                return f"{where} has {len(mine):,} prompts, not {len(others):,}"
            odd = [i for i, pair in enumerate(zip(mine, others, strict=True)) if pair[0] != pair[1]]
            if odd:
                more = f" (and {len(odd) - 1:,} more)" if odd[1:] else ""
                first = self.ids[name][odd[0]]
                return f"{where}: prompt {first!r}{more} has different tokens or a different answer"
        return None


def template_date(data: DataConfig, run: RunConfig) -> date | None:
    """Return the chat template's date: as set, as at the run's first start, or today."""
    if not data.chat_template:
        return None
    if data.chat_template_date is not None:
        return date.fromisoformat(data.chat_template_date)
    return recorded_date(Path(run.dir)) if _recorded(run) else date.today()


def recorded_date(directory: Path) -> date | None:
    """Return the date with which a run or an evaluation began, if it has one."""
    record = read(directory)
    return date.fromisoformat(record["date"]) if record and record["date"] else None


def check_unchanged(run: RunConfig, now: PromptDigests) -> None:
    """Raise UserError if a resumed run would have other prompts than at its first start."""
    record = _recorded(run)
    if record and (difference := now.difference(record["files"])):
        raise UserError(
            f"run.dir={run.dir} began with other prompts: {difference}; {CAUSES} "
            "has changed since its first start: restore it, or start a new run"
        )


def check_ranks(now: PromptDigests, gather: Callable[[Any], list[Any]]) -> None:
    """Raise UserError naming the ranks whose prompts differ from rank 0's; collective."""
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
    """Save the digests of a first start; called by one process."""
    if not (directory / FILE).exists():
        record: dict[str, Any] = {"date": now.date, "files": now.files}
        if now.dropped:
            record["dropped"] = now.dropped
        write_text(directory / FILE, json.dumps(record) + "\n")


def read(directory: Path) -> dict[str, Any] | None:
    """Return the saved digests; None if there are none."""
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"date": record["date"], "files": dict(record["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): restore it, or start a new run") from error


def _recorded(run: RunConfig) -> dict[str, Any] | None:
    """Return the record of the run in `run.dir`, unless there is none or it would be replaced."""
    return None if run.overwrite else read(Path(run.dir))


def _digest(prompt: Prompt) -> str:
    words = json.dumps([prompt.id, prompt.answer]).encode()
    return hashlib.sha256(words + array("q", prompt.tokens).tobytes()).hexdigest()[:DIGITS]


def _cut(digests: str) -> list[str]:
    return [digests[i : i + DIGITS] for i in range(0, len(digests), DIGITS)]
