"""Checkpoints of a run: the actor and the rest of the state that a resumed run needs.

The state of a run between two steps consists of weights and optimizer (`actor/checkpoint.py`) and
of parts with `state_dict()` and `load_state_dict(state)` in plain JSON: the position in the
prompts, the selector, the totals and files of the run.  They are in the checkpoint's `run.json`.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_prepo.actor import checkpoint, manifest, parallel
from megatron_prepo.actor.actor import Actor
from megatron_prepo.actor.async_save import PendingCheckpoint
from megatron_prepo.config import CheckpointConfig
from megatron_prepo.errors import Stopped, UserError
from megatron_prepo.files import ownership
from megatron_prepo.files.atomic import write_text
from megatron_prepo.rollout.engine import EngineError
from megatron_prepo.run.best import Best, is_record
from megatron_prepo.run.recorder import Run
from megatron_prepo.run.rollout_journal import Journal

WRITE_ERRORS = (OSError, RuntimeError)
"""What Megatron raises where a folder is gone; the latter is torch's."""

MAX_SHARE = 0.05
"""Largest share of a run's time that checkpoints take while `checkpoint.every` is empty."""


@dataclass(frozen=True)
class StepBoundary:
    """A snapshot of all parts between two steps."""

    step: int
    """Number of steps completed."""
    updates: int
    """Number of the actor's optimizer updates."""
    parts: str
    """State of the parts, as JSON."""


def is_affordable(seconds: Mapping[str, float]) -> bool:
    """Return whether checkpoints have taken at most MAX_SHARE of the seconds of all stages.

    The first step is followed by one; if each takes 3 s, the next ones follow every 60 s.
    """
    return seconds.get("checkpoint", 0.0) <= MAX_SHARE * sum(seconds.values())


def newest_checkpoint(run: Run) -> Path | None:
    """Return the newest complete checkpoint of this run; None if it starts from the beginning.

    Collective; all files are read.  Checkpoints that are damaged, hold weights only, or are another
    run's, are skipped and logged.  Raises UserError on all ranks if all are another run's and this
    one has made steps.
    """
    run.check_directory()
    directory, others = run.directory / "checkpoints", []
    for step in reversed(parallel.from_rank_zero(list(checkpoint.by_step(directory)))):
        path = checkpoint.checkpoint_path(directory, step)
        if problem := _problem(path):
            run.log(f"{path} {problem}; skipped")
        elif _is_of_another_run(path, run):
            run.log(
                f"{path} is another run's and is skipped (a new run can start from its "
                f"weights: model.megatron={path})"
            )
            others.append(path.name)
        else:
            return path
    if others and run.has_lines():
        raise UserError(
            f"none of the checkpoints in {directory} can be resumed from, since "
            f"{', '.join(others)} are another run's, and starting from the beginning would "
            f"remove this run's ledger: put this run's {ownership.MARKER} or checkpoints back, "
            "or move the other run's checkpoints away to start from the beginning"
        )
    return None


def _problem(path: Path) -> str | None:
    if problem := manifest.problem(path):
        return problem
    if not (path / checkpoint.RUN_STATE).is_file():
        return "holds weights only (checkpoint.optimizer=false)"
    return None


def _is_of_another_run(path: Path, run: Run) -> bool:
    """Return whether a complete checkpoint names another run; older versions named none."""
    state = json.loads(parallel.from_rank_zero((path / checkpoint.RUN_STATE).read_text()))["run"]
    own = parallel.from_rank_zero(run.identity)
    return state.get("identity") not in (None, own)


class Checkpoints:
    """The checkpoints of a run; all methods are collective, except `mark`.

    A checkpoint is written and renamed only after a check that the directory is still the run's
    (`Run.check_directory`).
    """

    def __init__(
        self,
        settings: CheckpointConfig,
        directory: Path,
        actor: Actor,
        parts: dict[str, Any],
        journal: Journal,
        log: Callable[[str], None],
        *,
        timeout_minutes: float,
        best: Best | None = None,
    ) -> None:
        """Set up; `parts` includes the `run`, which counts the steps and updates `best`."""
        self.settings, self.directory, self.timeout_minutes = settings, directory, timeout_minutes
        self.actor, self.parts, self.journal, self.log = actor, parts, journal, log
        self.steps = [0]
        """Steps that the run could resume from: its beginning, and its checkpoints."""
        self.saving: PendingCheckpoint | None = None
        self.saving_step = 0
        self.damaged: set[int] = set()
        """Steps of checkpoints that `restore` found no use for: newer than the restored one."""
        self.kept: set[Path] = set()
        """Checkpoints that could not be pruned."""
        self.best = best
        self.named: int | None = None
        """Step of the best checkpoint that is complete, on rank 0."""
        self.saved_at = time.monotonic()
        """Time at which the last checkpoint was begun, or the run, by the monotonic clock."""

    def restore(self, path: Path | None) -> None:
        """Restore a checkpoint of this run (`newest_checkpoint`), or the beginning without one."""
        self.parts["run"].check_directory()
        restored = checkpoint.step_number(path) if path else 0
        self.damaged = {step for step in checkpoint.by_step(self.directory) if step > restored}
        if path is None:
            self.parts["run"].restart()
        else:
            self._load(path)
        self._name_best()
        self._withdraw_best()
        self.mark()

    def _load(self, path: Path) -> None:
        self.actor.load(path)
        state = parallel.from_rank_zero((path / checkpoint.RUN_STATE).read_text())
        for name, part in json.loads(state).items():
            self.parts[name].load_state_dict(part)
        self.steps.append(checkpoint.step_number(path))
        self.log(f"resuming from {path}")
        num_ranks = len(list(path.glob("random_*.safetensors")))
        if num_ranks != dist.get_world_size():
            self.log(f"written by {num_ranks} ranks: numbers are equal up to rounding")

    def mark(self) -> None:
        """Take a snapshot of all parts at the boundary between two steps."""
        parts = json.dumps({name: part.state_dict() for name, part in self.parts.items()})
        self.boundary = StepBoundary(self.parts["run"].num_steps, self.actor.updates, parts)

    def save(self) -> None:
        """Write a checkpoint of the current state, between two steps, and prune older ones.

        With `checkpoint.asynchronous` it is complete only after `finish`.
        """
        self.mark()
        self._write()

    def keep_if_best(self) -> None:
        """Keep the state after an evaluation if it is the best so far: save it, unless it is saved.

        Collective, as `save`.
        """
        run = self.parts["run"]
        run.check_directory()
        if run.is_best() and run.num_steps not in (*self.steps, self.saving_step):
            self.save()
        self._name_best()

    def finish_if_done(self) -> None:
        """Finish the pending checkpoint if everything is written."""
        if self.saving and self.saving.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the pending checkpoint, if there is one, and give it its name."""
        if self.saving is None:
            return
        saving, self.saving = self.saving, None
        with self.parts["run"].lost_directory_named(WRITE_ERRORS):
            saving.finish(self.timeout_minutes, self.parts["run"].check_directory)
        self.steps.append(self.saving_step)
        self.damaged.discard(self.saving_step)
        self._name_best()
        if dist.get_rank() == 0:
            kept = checkpoint.prune(
                self.directory,
                keep_last=self.settings.num_kept,
                keep_every=self.settings.keep_every,
                keep=(self.named, self.best.step if self.best else None),
                damaged=self.damaged,
            )
            for path in kept.keys() - self.kept:
                self.log(f"{path} is kept: {kept[path][0]} is not known to be this run's")
            self.kept |= kept.keys()
        # rollouts that only the newest covers are kept, in case it turns out to be damaged
        self.journal.forget(before=self.steps[-2])

    @contextmanager
    def saved_if_the_engine_fails(self) -> Iterator[None]:
        """Save the last step if the engine fails, and raise Stopped in place of its error.

        All ranks take part, since an engine's error is raised on each of them.
        """
        try:
            with self.parts["run"].lost_directory_named():
                yield
        except EngineError as error:
            assert self.actor.updates == self.boundary.updates, "an update does not call the engine"
            self.finish()
            if self.boundary.step not in self.steps:
                self._write()
                self.finish()
            raise Stopped(
                f"the engine failed: {error}\n{self.boundary.step} steps are saved, and the same "
                "command resumes the run",
                exit_code=1,
            ) from error

    def _name_best(self) -> None:
        """Name the best checkpoint in `best.json` once it is complete, which takes a while."""
        if self.best is None or self.best.step in (None, self.named) or dist.get_rank() != 0:
            return
        path = checkpoint.checkpoint_path(self.directory, self.best.step)
        if self.best.step not in self.damaged and manifest.is_complete(path):
            named = {"checkpoint": path.name, **vars(self.best)}
            write_text(self.directory / checkpoint.BEST, json.dumps(named, indent=1) + "\n")
            self.named = self.best.step

    def _withdraw_best(self) -> None:
        """Remove `best.json` if the restored state has no best checkpoint, so that none is kept.

        The file is of another metric, or of steps that are repeated.
        """
        path = self.directory / checkpoint.BEST
        if self.named is None and dist.get_rank() == 0 and is_record(path):
            path.unlink()
            self.log(f"removed {path}: what it names is no longer known as the best checkpoint")

    def _write(self) -> None:
        self.finish()  # one at a time
        self.parts["run"].check_directory()
        self.saved_at = time.monotonic()
        self.saving_step, asynchronous = self.boundary.step, self.settings.asynchronous
        with self.parts["run"].lost_directory_named(WRITE_ERRORS):
            self.saving = self.actor.start_saving(
                self.directory,
                step=self.saving_step,
                run_state=self.boundary.parts,
                copy=asynchronous,
            )
        if not asynchronous:
            self.finish()
