"""Rollouts that have been paid for and that no checkpoint covers yet, so that none is paid twice.

They are written as they come, to `journal/PURPOSE_STEP.RANK.jsonl`: a line for each completion of a
server, or for each batch of the embedded engine, which is there whole or not at all and so is the
same batch again if it has to be generated again.  A run that goes on and comes to the same step, by
the same weights, takes what is there and generates the rest.  A rollout has random numbers of its
own, named by purpose, prompt and sample, so the order of arrival changes nothing.

Killing a process takes nothing of what it wrote.  Against the end of the machine the lines are
forced to disk, every second and before anything is made of them.

The run's directory may be moved, removed or replaced while the run is live, and ranks add lines at
moments of their own, where one that raises would leave the others waiting.  So each rank holds the
directory open: lines go where it goes, never to what takes its place, and nowhere once it is
removed, until all ranks look together (`Run.check_directory`).  Lines have the run's identity, and
those of another run are not taken.
"""

import base64
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_prepo.files import ownership
from megatron_prepo.files.atomic import flush, naming, read_lines
from megatron_prepo.records import Prompt, Rollout

NAME = re.compile(r"\w+_(?P<step>\d+)\.\d+\.jsonl")
"""Of our files; anything else in the directory is left alone."""
FIELDS = ("tokens", "engine_logprobs", "text", "finished", "aborted")
"""What a line holds of each rollout, behind its prompt and sample; the weight version is the
line's.  Behind them comes its routing, base64, if it has one."""
SECONDS_UNFORCED = 1.0
"""A step of a thousand completions must not wait for the disk a thousand times."""


class Journal:
    """`share` gives rank 0's value to every rank; each rank writes a file of its own, rank 0 reads.

    `add` may be called from another thread, one call at a time.
    """

    def __init__(self, directory: Path, rank: int, share: Callable[[Any], Any]) -> None:
        self.directory, self.rank = directory, rank
        self._place = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY)
        self.identity = ownership.run_identity(directory)
        lines = share(_read(directory, self.identity) if rank == 0 else None)
        self.waiting = {
            (line["purpose"], line["weight_version"], prompt, sample): fields
            for line in lines
            for prompt, sample, *fields in line["rollouts"]
        }
        self._unforced: str | None = None
        self._forced_at = time.monotonic()

    def find(
        self, purpose: str, weight_version: int | None, prompts: Sequence[Prompt]
    ) -> dict[tuple[str, int], Rollout]:
        """What of these prompts was paid for before the run stopped, by prompt's id and sample.

        Once: it is not found again.
        """
        if weight_version is None:  # the engine has failed, and generates nothing
            return {}
        prompt_of = {prompt.id: prompt for prompt in prompts}
        keys = [
            key
            for key in self.waiting
            if key[:2] == (purpose, weight_version) and key[2] in prompt_of
        ]
        return {
            key[2:]: _rollout(self.waiting.pop(key), prompt_of[key[2]], weight_version)
            for key in keys
        }

    def add(self, purpose: str, rollouts: Mapping[tuple[str, int], Rollout]) -> None:
        """Rollouts for `PURPOSE/STEP` that have just come; written when this returns.

        On disk after `force`.  Raises OSError.  Nothing is written once the run's directory is
        removed.
        """
        [weight_version] = {rollout.weight_version for rollout in rollouts.values()}
        line = {
            "run": self.identity,
            "purpose": purpose,
            "weight_version": weight_version,
            "rollouts": [[*key, *_fields(rollout)] for key, rollout in rollouts.items()],
        }
        name = f"{purpose.replace('/', '_')}.{self.rank}.jsonl"
        with self._unless_removed():
            with suppress(FileExistsError):
                os.mkdir(self.directory.name, dir_fd=self._place)
            path = f"{self.directory.name}/{name}"
            with naming(self.directory / name), open(path, "a", opener=self._open) as file:
                file.write(json.dumps(line) + "\n")
            self._unforced = path
        if time.monotonic() - self._forced_at > SECONDS_UNFORCED:
            self.force()

    def force(self) -> None:
        """All that was added is on disk when this returns."""
        if self._unforced:
            with self._unless_removed():
                flush(self._unforced, dir_fd=self._place)
                flush(self.directory.name, dir_fd=self._place)
        self._unforced, self._forced_at = None, time.monotonic()

    def forget(self, before: int) -> None:
        """Drop the rollouts of steps before this one: checkpoints cover them."""
        if self.rank == 0:
            for path in _ours(self.directory):
                name = NAME.fullmatch(path.name)
                if name and int(name["step"]) < before:
                    path.unlink()

    def close(self) -> None:
        """The run is finished."""
        os.close(self._place)
        if self.rank == 0:
            for path in _ours(self.directory):
                path.unlink()
            with suppress(OSError):  # there is none, or it holds something else
                self.directory.rmdir()

    def _open(self, path: str, flags: int) -> int:
        return os.open(path, flags, 0o666, dir_fd=self._place)

    @contextmanager
    def _unless_removed(self) -> Iterator[None]:
        """Pass over a FileNotFoundError that comes from the run's directory being gone."""
        try:
            yield
        except FileNotFoundError:
            try:
                found = os.stat(self.directory.parent)
            except FileNotFoundError:
                return
            if os.path.samestat(os.fstat(self._place), found):
                raise


def _ours(directory: Path) -> list[Path]:
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted(p for p in paths if NAME.fullmatch(p.name) and p.is_file() and not p.is_symlink())


def _read(directory: Path, run: str | None) -> list[dict[str, Any]]:
    """Lines of this run, or of an older version's, which have no identity.

    One that was being written when the run stopped is cut off.
    """
    lines: list[dict[str, Any]] = []
    for path in _ours(directory):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(path, len(whole))
        lines += read_lines(path)
    own = [line for line in lines if line.get("run") in (None, run)]
    if others := len(lines) - len(own):
        print(
            f"{directory}: skipped {others} lines with another run's rollouts",
            file=sys.stderr,
        )
    return own


def _fields(rollout: Rollout) -> list[Any]:
    fields = [getattr(rollout, name) for name in FIELDS]
    if rollout.routing is None:
        return fields
    return [*fields, base64.b64encode(rollout.routing).decode()]


def _rollout(fields: list[Any], prompt: Prompt, weight_version: int) -> Rollout:
    values = dict(zip(FIELDS, fields[: len(FIELDS)], strict=True))
    values |= {name: tuple(values[name]) for name in ("tokens", "engine_logprobs")}
    if len(fields) > len(FIELDS):
        (routing,) = fields[len(FIELDS) :]
        values["routing"] = base64.b64decode(routing, validate=True)
    return Rollout(prompt=prompt, weight_version=weight_version, **values)
