"""One run of a comparison before it starts: an arm at a seed."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_prepo.compare import record as run_record
from megatron_prepo.config import Config
from megatron_prepo.errors import UserError


@dataclass(frozen=True)
class PlannedRun:
    """One arm at one seed."""

    arm: str
    seed: int
    directory: Path
    overrides: list[str]
    """All that follows CONFIG on the command line, but for where the run lives."""
    config: Config

    @property
    def name(self) -> str:
        """As it is called on the terminal."""
        return f"{self.arm}/{self.seed}"

    def is_finished(self) -> bool:
        """Whether it is there; UserError if what is there is something else."""
        if not run_record.is_finished(self.directory):
            return False
        self.must_equal(run_record.read_config(self.directory), f"{self.directory} holds")
        return True

    def replacing(self) -> Config:
        """The configuration with which it starts: the rest of an interrupted run is replaced."""
        section = dataclasses.replace(self.config.run, overwrite=True)
        return dataclasses.replace(self.config, run=section)

    def must_equal(self, other: Config, where: str) -> None:
        """UserError naming the settings in which a finished run is another one."""
        before = run_record.settings(other)
        refuse_other_settings(before, run_record.settings(self.config), self.name, where)


def refuse_other_settings(before: dict, now: dict, run: str, where: str) -> None:
    """UserError if a finished run of that name has other settings."""
    changed = run_record.differences(before, now)
    if changed:
        raise UserError(
            f"{where} a finished {run} with other settings ({'; '.join(changed)}); "
            "choose another --dir and --name, or give the same settings"
        )
