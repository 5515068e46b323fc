"""The record of every rollout ever paid for: one JSON line each, appended, never changed.

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
    """Rolled out to be learnt from, or a probe of the oracle."""
    trained: bool
    """Whether it was learnt from: methods that refill drop groups."""
    ppl: float | None
    """The prompt's perplexity when it was chosen; None for a method that does not score prompts."""
    reward: float
    length: int
    """Tokens of the completion."""
    finished: bool
    """Whether it ended by itself."""
    mean_entropy: float | None
    """Mean full-vocabulary entropy of its tokens before the update, in nats, if it was trained."""
    weight: float | None
    """Its weight in the loss, if it was trained."""
    zero_variance: bool
    """Its group's rewards were all equal: paid for, but without a gradient."""
    weight_version: int
    """Optimizer updates behind the weights that generated it."""
    aborted: bool = False
    """Whether it was cut because it took too long."""
    staleness: int = 0
    """Optimizer updates between those weights and the ones that learnt from it."""
    graded: Literal["ok", "timeout", "error"] = "ok"
    """Whether the reward is the function's: else it broke a limit, or raised."""


class Ledger:
    """Appends to a file; a step's entries are on disk when `append` returns."""

    def __init__(self, path: str | Path) -> None:
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - as long as the run

    def append(self, entries: Sequence[LedgerEntry]) -> None:
        """Write the entries of a step."""
        append(self.file, "".join(json.dumps(asdict(entry)) + "\n" for entry in entries))

    def close(self) -> None:
        """No more entries."""
        self.file.close()


def read(path: str | Path) -> Iterator[LedgerEntry]:
    """The entries of a ledger, in order."""
    return (LedgerEntry(**entry) for entry in read_lines(path))
