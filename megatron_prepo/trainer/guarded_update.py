"""Guarded optimizer updates: dumped on request, skipped if not finite.

The loop calls `of_step(record).update(mini_batch)` in place of the actor's `update`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from megatron_prepo.actor.actor import Actor, BackwardResult, TrainingSequence
from megatron_prepo.config import Config
from megatron_prepo.debug.dump import DumpWriter, StepRecord
from megatron_prepo.run.recorder import Run


class Learner(Protocol):
    """Interface of optimizer updates: the actor, or a guard of its updates."""

    def update(self, batch: Sequence[TrainingSequence]) -> dict[str, float] | None:
        """Return the update's metrics; None if it was skipped, on all ranks."""


class UpdateGuard:
    """The run's guard, which counts skipped updates."""

    def __init__(self, config: Config, actor: Actor, run: Run) -> None:
        self.config, self.actor, self.run = config, actor, run
        self.skipped_in_a_row = self.skip_dumps = 0

    def of_step(self, record: StepRecord) -> "GuardedStep":
        """Return the guard of a step's updates."""
        return GuardedStep(self, record)

    def learns_from(self, advantage: float) -> bool:
        """Return whether an update passes through a rollout of this advantage."""
        return self.actor.has_gradient(advantage)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts so far."""
        return {"skipped_in_a_row": self.skipped_in_a_row, "skip_dumps": self.skip_dumps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume counting."""
        self.skipped_in_a_row, self.skip_dumps = state["skipped_in_a_row"], state["skip_dumps"]

    def begin_dump(self, record: StepRecord, suffix: str, why: str) -> DumpWriter:
        """Return the writer of a dump of this step; collective."""
        self.run.check_directory()
        directory = self.run.directory / "dumps" / f"step_{record.step:04d}{suffix}"
        return DumpWriter(directory, self.actor, self.config, record, why=why)

    def skip(self, error: FloatingPointError, dump_it: Callable[[], str]) -> None:
        """Count a skipped update; raise the error if there were too many in a row.

        `dump_it()` writes the update's dump and returns its directory.
        """
        self.skipped_in_a_row += 1
        allowed, dumped = self.config.train.max_skipped_updates, "no more of them are dumped"
        if self.skip_dumps < self.config.debug.max_skip_dumps:
            self.skip_dumps += 1
            dumped = f"see it by `megatron-prepo replay {dump_it()}`"
        if self.skipped_in_a_row > allowed:
            raise FloatingPointError(
                f"{error}; {self.skipped_in_a_row} in a row are more than "
                f"train.max_skipped_updates={allowed}; {dumped}"
            ) from error
        self.run.log(f"skipped: {error}; {dumped}")


class GuardedStep:
    """The guard of one step, whose mini-batches are updated in order."""

    def __init__(self, updates: UpdateGuard, record: StepRecord) -> None:
        self.updates, self.record = updates, record
        self.actor, self.dump_steps = updates.actor, updates.config.debug.dump_steps
        self.number = 0
        self.asked_for: DumpWriter | None = None

    def update(self, batch: Sequence[TrainingSequence]) -> dict[str, float] | None:
        """Make the actor's update; return None if it was skipped, on all ranks."""
        number, self.number = self.number, self.number + 1
        last = self.number == len(self.record.mini_batches)
        if number == 0 and self.record.step in self.dump_steps:
            self.asked_for = self.updates.begin_dump(self.record, "", "debug.dump_steps")
        gradient = self.actor.backward(batch)
        if self.asked_for:
            self.asked_for.add(number, batch, gradient)
            if last:
                self.asked_for.finish()
        try:
            metrics = self.actor.step(gradient)
        except FloatingPointError as error:
            self.updates.skip(error, lambda: self._dump_skipped(number, batch, gradient))
            return None
        self.updates.skipped_in_a_row = 0
        return metrics

    def _dump_skipped(
        self, number: int, batch: Sequence[TrainingSequence], gradient: BackwardResult
    ) -> str:
        dump = self.updates.begin_dump(self.record, f"_update_{number}_skipped", "not finite")
        dump.add(number, batch, gradient)
        dump.finish()
        return str(dump.directory)


class SkipUpdates:
    """A guard that makes no update, for `debug.mode=rollout`."""

    def __init__(self, run: Run) -> None:
        run.log("debug.mode=rollout: the weights stay unchanged")

    def of_step(self, record: StepRecord) -> "SkipUpdates":
        """Return itself, for every step."""
        return self

    def learns_from(self, advantage: float) -> bool:
        """Return False: no update passes through any rollout."""
        return False

    def update(self, batch: Sequence[TrainingSequence]) -> None:
        """Make no update; it is counted as skipped."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing."""
