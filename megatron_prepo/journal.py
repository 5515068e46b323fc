"""Rollouts that have been paid for and that no checkpoint covers yet, so that none is paid twice.

Each batch of rollouts is a line of `journal/PURPOSE_STEP.jsonl`, on disk before anything is made of
it.  A run that goes on and comes to the same batch, by the same weights, finds its rollouts there.
"""

import base64
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_prepo.durable import flush
from megatron_prepo.records import Prompt, Rollout

FIELDS = ("tokens", "engine_logprobs", "text", "finished", "aborted")
"""What a line holds of each rollout; prompt and weight version are the batch's.  Behind them comes
its routing, base64, if it has one."""


class Journal:
    """`share` gives rank 0's value to every rank; the rank that `writes` has the files."""

    def __init__(self, directory: Path, writes: bool, share: Callable[[Any], Any]):
        self.directory, self.writes = directory, writes
        lines = share(_read(directory) if writes else None)
        self.waiting = {
            (line["purpose"], line["weight_version"], *line["prompts"]): line["rollouts"]
            for line in lines
        }

    def find(
        self, purpose: str, weight_version: int, prompts: Sequence[Prompt]
    ) -> list[Rollout] | None:
        """What was paid for before the run stopped; None for another batch."""
        rows = self.waiting.pop((purpose, weight_version, *(p.id for p in prompts)), None)
        if rows is None:
            return None
        samples = len(rows) // len(prompts)
        return [_rollout(row, prompts[n // samples], weight_version) for n, row in enumerate(rows)]

    def add(self, purpose: str, rollouts: Sequence[Rollout]) -> None:
        """A batch, `PURPOSE/STEP`, that has just been paid for; on disk when this returns."""
        if not self.writes:
            return
        line = {
            "purpose": purpose,
            "weight_version": rollouts[0].weight_version,
            "prompts": list(dict.fromkeys(rollout.prompt.id for rollout in rollouts)),
            "rollouts": [_row(rollout) for rollout in rollouts],
        }
        self.directory.mkdir(exist_ok=True)
        with open(self.directory / f"{purpose.replace('/', '_')}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        flush(self.directory)

    def forget(self, before: int) -> None:
        """Drop the batches of steps before this one: checkpoints cover them."""
        if self.writes:
            for path in self.directory.glob("*.jsonl"):
                if int(path.stem.rpartition("_")[2]) < before:
                    path.unlink()

    def close(self) -> None:
        """The run is finished."""
        if self.writes:
            shutil.rmtree(self.directory, ignore_errors=True)


def _read(directory: Path) -> list[dict]:
    """All lines; one that was being written when the run stopped is cut off."""
    lines = []
    for path in sorted(directory.glob("*.jsonl")):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(path, len(whole))
        lines += [json.loads(line) for line in whole.splitlines()]
    return lines


def _row(rollout: Rollout) -> list:
    row = [getattr(rollout, name) for name in FIELDS]
    return row if rollout.routing is None else [*row, base64.b64encode(rollout.routing).decode()]


def _rollout(row: list, prompt: Prompt, weight_version: int) -> Rollout:
    row, routing = row[: len(FIELDS)], row[len(FIELDS) :]
    values = dict(zip(FIELDS, row, strict=True))
    values |= {name: tuple(values[name]) for name in ("tokens", "engine_logprobs")}
    if routing:
        values["routing"] = base64.b64decode(*routing, validate=True)
    return Rollout(prompt=prompt, weight_version=weight_version, **values)
