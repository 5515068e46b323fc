"""Journal of the rollouts that no checkpoint covers yet, so that none is generated twice.

Rollouts are written as they arrive, to `journal/PURPOSE_STEP.RANK.jsonl`: one line for each
completion of a server, or for each batch of the embedded engine.  A batch is written completely or
not at all, so a batch that has to be generated again is composed as before.  A resumed run that
reaches the same step with the same weights reuses the rollouts of the journal and generates the
rest.  The random numbers of a rollout are derived from purpose, prompt and sample, so the order of
arrival changes nothing.

Lines survive the death of the process that wrote them.  To survive a crash of the machine they are
forced to disk, every second and before they are used.

The run's directory may be moved, removed or replaced during the run.  Ranks add lines at different
times, and a rank that raised an error there would leave its peers waiting.  So each rank holds the
directory open: lines follow a directory that is moved, are never written to one that replaces it,
and are dropped once it is removed, until all ranks check together (`Run.check_directory`).  Lines
carry the run's identity; lines of another run are skipped.
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
"""Names of the journal's files; anything else in the directory is left alone."""
FIELDS = ("tokens", "engine_logprobs", "text", "finished", "aborted")
"""Fields of a rollout in a line, after its prompt's id and sample; the weight version is per line.
Its routing, if it has one, follows in base64."""
SECONDS_UNFORCED = 1.0
"""Interval of forced writes: a step of 1,000 completions must not wait for the disk 1,000 times."""


class Journal:
    """The journal of a run; each rank writes its own file, rank 0 reads all of them.

    `share` gives rank 0's value to every rank.  `add` may be called from another thread, one call
    at a time.
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
        self,
        purpose: str,
        weight_version: int | None,
        prompts: Sequence[Prompt],
        samples: Sequence[range] | None = None,
    ) -> dict[tuple[str, int], Rollout]:
        """Return the journaled rollouts of these prompts, by prompt's id and sample.

        Each is returned once.  `samples`: the numbers of each prompt's samples, if another round of
        the step may have further ones; by default all.
        """
        if weight_version is None:  # the engine has failed, and generates nothing
            return {}
        prompt_of = {prompt.id: prompt for prompt in prompts}
        ids = [prompt.id for prompt in prompts]
        wanted = None if samples is None else dict(zip(ids, samples, strict=True))
        keys = [
            key
            for key in self.waiting
            if key[:2] == (purpose, weight_version)
            and key[2] in prompt_of
            and (wanted is None or key[3] in wanted[key[2]])
        ]
        return {
            key[2:]: _rollout(self.waiting.pop(key), prompt_of[key[2]], weight_version)
            for key in keys
        }

    def add(self, purpose: str, rollouts: Mapping[tuple[str, int], Rollout]) -> None:
        """Write new rollouts for `PURPOSE/STEP`; they are on disk after `force`.

        Raises OSError.  Nothing is written once the run's directory is removed.
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
        """Force everything that was added to disk."""
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
        """Remove the journal of a finished run."""
        os.close(self._place)
        if self.rank == 0:
            for path in _ours(self.directory):
                path.unlink()
            with suppress(OSError):  # missing, or not empty
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
    """Return the lines of this run, and lines without an identity, as older versions wrote them.

    An incomplete last line is cut off.
    """
    lines: list[dict[str, Any]] = []
    for path in _ours(directory):
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        os.truncate(path, len(complete))
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
