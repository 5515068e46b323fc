"""The record of every generated rollout: one JSON line each, appended, never changed.

Read it with ``pandas.read_json("ledger.jsonl", lines=True)``.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_prepo.files.atomic import append, read_lines


@dataclass(frozen=True)
class LedgerEntry:
    """One rollout."""

    step: int
    prompt_id: str
    sample: int
    """Number of the rollout within its group."""
    selector: str
    purpose: Literal["train", "probe"]
    """Whether it was generated for training, or as a probe of the oracle."""
    trained: bool
    """Whether the policy was trained on it: methods that refill drop groups, and
    `rollout.overlong=mask` excludes completions that are cut off."""
    ppl: float | None
    """The prompt's perplexity when it was chosen; None for a method that does not score prompts."""
    reward: float
    length: int
    """Tokens of the completion."""
    finished: bool
    """Whether it ended with a stop token."""
    mean_entropy: float | None
    """Mean full-vocabulary entropy of its tokens before the update, in nats; None if its group was
    dropped."""
    weight: float | None
    """Weight in the loss; None if it was not trained on."""
    zero_variance: bool
    """Whether its group's rewards were all equal, so that it contributed no gradient."""
    weight_version: int
    """Number of optimizer updates of the weights that generated it."""
    aborted: bool = False
    """Whether it was cut off because it took too long."""
    staleness: int = 0
    """Number of optimizer updates between those weights and the weights that it trained."""
    graded: Literal["ok", "timeout", "error"] = "ok"
    """`ok` if the reward function returned the reward; else it exceeded a limit, or raised."""


class Ledger:
    """Appends to a file; a step's entries are on disk when `append` returns."""

    def __init__(self, path: str | Path) -> None:
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - as long as the run

    def append(self, entries: Sequence[LedgerEntry]) -> None:
        """Write the entries of a step."""
        append(self.file, "".join(json.dumps(asdict(entry)) + "\n" for entry in entries))

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read(path: str | Path) -> Iterator[LedgerEntry]:
    """Read the entries of a ledger, in order."""
    return (LedgerEntry(**entry) for entry in read_lines(path))
