"""One run of a comparison, before it starts."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_prepo.compare import record as run_record
from megatron_prepo.compare.record import Settings
from megatron_prepo.config import Config
from megatron_prepo.errors import UserError


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
        """Raise UserError with the settings in which a finished run differs."""
        before = run_record.settings(other)
        refuse_other_settings(before, run_record.settings(self.config), self.name, where)


def refuse_other_settings(before: Settings, now: Settings, run: str, where: str) -> None:
    """Raise UserError if a finished run of this name has other settings."""
    changed = run_record.differences(before, now)
    if changed:
        raise UserError(
            f"{where} a finished {run} with other settings ({'; '.join(changed)}); "
            "choose another --dir and --name, or give the same settings"
        )
