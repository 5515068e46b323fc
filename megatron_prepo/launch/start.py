"""The start of a run on this machine: the launcher that starts its ranks, and one of them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prepo import config as configuration
from megatron_prepo.process import local_ranks


def train(path: str | Path, overrides: Sequence[str], max_restarts: int = 0) -> None:
    """Check the configuration and its inputs, start the ranks, wait for them.

    After a failure that the user cannot fix, the ranks are started again, up to `max_restarts`
    times.
    """
    from megatron_prepo.inputs import preflight
    from megatron_prepo.run import dashboards
    from megatron_prepo.run import directory as run_directory

    config = configuration.load(path, overrides)
    needed = run_directory.needs_initial_weights(config.run, config.loss)
    preflight.check_present(config, *preflight.inputs_read(config, initial_weights=needed))
    run_directory.check_config_file(config.run, path)
    run_directory.check(config)
    dashboards.check(config.run)
    preflight.check(config, initial_weights=needed)
    run_directory.begin(config, _log)
    run_directory.end(Path(config.run.dir))  # rank 0 takes the lock, since it must not run twice
    command = [sys.executable, "-m", "megatron_prepo", "train", str(path), *overrides]
    for restarts_left in reversed(range(max_restarts + 1)):
        try:
            return local_ranks.start(
                [*command, "run.overwrite=false"],  # the directory now holds this run
                num_ranks=config.parallel.num_ranks,
                log_directory=Path(config.run.dir) / "logs",
            )
        except local_ranks.RanksFailed as error:
            if error.exit_code == 2 or not restarts_left:
                raise
            _log(f"{error}\nstarted again ({restarts_left} left)")


def train_rank(path: str | Path, overrides: Sequence[str]) -> int:
    """Train as the rank that RANK, WORLD_SIZE and so on name; returns its exit code."""

    def rank() -> None:
        from megatron_prepo.run import directory as run_directory
        from megatron_prepo.run import summary as report
        from megatron_prepo.train import train
        from megatron_prepo.train_async import train_overlapped

        config = configuration.load(path, overrides)
        run_directory.check_config_file(config.run, path)
        summary = train_overlapped(config) if config.train.overlap else train(config)
        if os.environ["RANK"] == "0":
            print(report.text(summary))

    return local_ranks.run_rank(rank)


def without_overwriting_again(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a command that torchrun or Slurm may have started before.

    What is in the directory then is the run's own progress.
    """
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    again = any(os.environ.get(name, "0") not in ("", "0") for name in counts)
    return [*overrides, "run.overwrite=false"] if again else [*overrides]


def _log(line: str) -> None:
    print(line, file=sys.stderr)
