"""Time limit of a Slurm job, and a check that it leaves time to train before the warning signal.

    start | start-up | training | warning: save within checkpoint.grace_seconds, exit | limit

Slurm sends the warning (`--signal`) up to a minute early, and at the start of a job that is shorter
than that: such a job would always stop before its first step.
"""

import re

from megatron_prepo.errors import UserError

LEAVING_SECONDS = 60
"""Time between the end of a run's time for saving and the limit of its job."""
EARLY_SECONDS = 60
"""Maximum time by which Slurm's warning may come early (sbatch(1), --signal)."""
STARTING_SECONDS = 60
"""Minimum time from the start of a job to its first step."""

FORMS = (
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?",
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
)
UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
UNLIMITED = ("0", "-1", "infinite", "unlimited")


def seconds(limit: str) -> float:
    """Return the seconds of a time limit as sbatch reads it; infinity for none.

    >>> [seconds(limit) for limit in ("90", "90:30", "1:30:00", "2-12", "2-12:30", "UNLIMITED")]
    [5400.0, 5430.0, 5400.0, 216000.0, 217800.0, inf]
    """
    if limit.lower() in UNLIMITED:
        return float("inf")
    for form in FORMS:
        if match := re.fullmatch(form, limit):
            parts = match.groupdict(default="0")
            return float(sum(UNITS[name] * int(value) for name, value in parts.items()))
    raise UserError(
        f"--time {limit} is not a time limit of Slurm: write minutes, minutes:seconds, "
        "hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds"
    )


def warning(grace_seconds: float) -> str:
    """Return the value of `--signal` for a run that has this long to save."""
    return f"USR1@{round(grace_seconds) + LEAVING_SECONDS}"


def check(limit: str, signal: str) -> None:
    """Raise UserError for a limit that leaves no time to train before the signal."""
    before = re.fullmatch(r"(?:[RB]+:)?\w+(?:@(\d+))?", signal)
    if before is None:
        raise UserError(f"signal={signal} must have the form USR1@360: a signal, and seconds")
    warned = int(before[1] or 60)
    least = warned + EARLY_SECONDS + STARTING_SECONDS
    if seconds(limit) <= least:
        raise UserError(
            f"--time {limit} leaves no time to train: the job gets the signal to save {warned} s "
            f"before its limit (checkpoint.grace_seconds, and {LEAVING_SECONDS} s to exit), Slurm "
            f"may send it {EARLY_SECONDS} s early, and starting takes {STARTING_SECONDS} s; set "
            f"--time above {least} s, or lower checkpoint.grace_seconds"
        )
