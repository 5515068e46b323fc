"""One run of a comparison, before it starts."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_prepo.compare import record as run_record
from megatron_prepo.compare.record import Settings
from megatron_prepo.config import Config
from megatron_prepo.errors import UserError
from megatron_prepo.files import ownership
from megatron_prepo.run import directory as run_directory

LOG = "train.log"
"""File in a run's directory with the output of its ranks."""


@dataclass(frozen=True)
class PlannedRun:
    """One arm at one seed."""

    arm: str
    seed: int
    directory: Path
    overrides: list[str]
    """Everything that follows CONFIG on the command line, except `run.dir`."""
    config: Config

    @property
    def name(self) -> str:
        """Arm and seed, as shown on the terminal."""
        return f"{self.arm}/{self.seed}"

    def is_finished(self) -> bool:
        """Return whether its directory has the finished run; UserError if it has another one."""
        if not run_record.is_finished(self.directory):
            return False
        self.must_equal(run_record.read_config(self.directory), f"{self.directory} holds")
        return True

    def replacing(self) -> Config:
        """Return the configuration it starts with, which replaces an interrupted run."""
        section = dataclasses.replace(self.config.run, overwrite=True)
        return dataclasses.replace(self.config, run=section)

    def must_equal(self, other: Config, where: str) -> None:
        """Raise UserError with the settings in which a run differs."""
        before = run_record.settings(other)
        refuse_other_settings(before, run_record.settings(self.config), self.name, where)

    def check_directory(self) -> None:
        """Raise UserError if its start would touch anything but an interrupted run of this arm.

        Nothing is written.
        """
        run_directory.check(self.replacing())
        if run_directory.has_made_a_step(self.directory):
            self.must_equal(run_record.read_config(self.directory), f"{self.directory} holds")
        log = self.directory / LOG
        if os.path.lexists(log) and not run_directory.ours(self.directory):
            raise UserError(
                f"{log} exists, and no run of a comparison wrote it; nothing was written: choose "
                "another --dir, or move it away"
            )

    def make_directory(self) -> None:
        """Mark the directory before anything else is in it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not run_directory.ours(self.directory):
            ownership.mark(self.directory, ownership.RUN, identity=ownership.new_identity())


def refuse_other_settings(before: Settings, now: Settings, run: str, where: str) -> None:
    """Raise UserError if the run of this name has other settings."""
    try:
        changed = run_record.differences(before, now)
    except UserError as error:
        raise UserError(
            f"{where} a run {run} that cannot be compared: {error}, with another --dir and --name"
        ) from None
    if changed:
        raise UserError(
            f"{where} a run {run} with other settings ({'; '.join(changed)}); "
            "choose another --dir and --name, or give the same settings"
        )
