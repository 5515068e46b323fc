"""The start of a run on this machine: the launcher that starts its ranks, and one of them."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prepo import config as configuration
from megatron_prepo.config import Config
from megatron_prepo.errors import Stopped
from megatron_prepo.process import activity, local_ranks


def train(path: str | Path, overrides: Sequence[str], max_restarts: int = 0) -> None:
    """Check the configuration and its inputs, start the ranks, wait for them.

    After a failure that the user cannot fix, the ranks are started again, up to `max_restarts`
    times.
    """
    from megatron_prepo.inputs import hub, preflight
    from megatron_prepo.run import directory as run_directory
    from megatron_prepo.run import opening

    config = configuration.load(path, overrides)
    needed = run_directory.needs_initial_weights(config)
    preflight.check_present(config, *preflight.inputs_read(config.model, initial_weights=needed))
    config = hub.resolved(config, weights=needed)
    with activity.doing("checking settings, model and prompts"):
        _check(config, path)  # a refusal is one line: nothing is printed before it
    num_ranks, run = config.parallel.num_ranks, Path(config.run.dir)
    _log(opening.text(config, num_ranks=num_ranks, launched=True))
    _log(f"the inputs are valid; starting {num_ranks} rank{'s' if num_ranks > 1 else ''}")
    command = [sys.executable, "-m", "megatron_prepo", "train", str(path), *overrides]
    for restarts_left in reversed(range(max_restarts + 1)):
        try:
            return local_ranks.start(
                [*command, "run.overwrite=false"],  # the directory now holds this run
                num_ranks=num_ranks,
                log_directory=run / "logs",
            )
        except local_ranks.RanksFailed as error:
            if error.exit_code == 2 or not restarts_left:
                raise
            _log(f"{error}\nstarted again ({restarts_left} left)")
        except Stopped as stopped:
            raise Stopped(
                f"{stopped}\n{_to_resume(Path(config.run.dir))}", exit_code=stopped.exit_code
            ) from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; {_to_resume(run)}") from None


def describe(path: str | Path, overrides: Sequence[str]) -> str:
    """Return what `train` would start, and what is missing for it here; nothing is started.

    The servers' commands are those for a machine with GPUs.
    """
    from megatron_prepo.launch import doctor
    from megatron_prepo.rollout import build
    from megatron_prepo.rollout.placement import GPUS_PER_NODE, place
    from megatron_prepo.run import opening

    config = configuration.load(path, overrides)
    num_ranks = config.parallel.num_ranks
    build.check_servers_nodes(config.servers)
    import torch

    gpus = torch.cuda.device_count() or GPUS_PER_NODE
    where = place(config, gpus_per_node=max(num_ranks, gpus))
    words = [sys.executable, "-m", "megatron_prepo", "train", str(path), *overrides]
    commands = [f"{num_ranks} rank{'s' if num_ranks > 1 else ''}: {shlex.join(words)}"]
    if where.started_by == "run":
        commands.append(_server_command(config, where.servers_per_node))
    with activity.doing("checking settings, model and prompts"):
        findings = [one for one in doctor.examine(config) if one.state == "missing"]
    return "\n\n".join(
        [
            opening.text(
                config,
                num_ranks=num_ranks,
                launched=True,
                num_servers=where.servers_per_node,
            ),
            "\n".join(commands),
            doctor.text(findings),
            "nothing was started (--dry-run)",
        ]
    )


def _server_command(config: Config, count: int) -> str:
    from megatron_prepo.rollout.sglang import launch

    words = launch.arguments(config, 0, port=30000, cuda=True)
    words = [launch.interpreter(config.servers), "-m", "sglang.launch_server", *words]
    others = f"; the other {count - 1} with other ports and seeds" if count > 1 else ""
    return f"server 0, at a free port{others}: {shlex.join(words)}"


def _check(config: Config, path: str | Path) -> None:
    """Check the inputs of a run and prepare its directory."""
    from megatron_prepo.inputs import preflight
    from megatron_prepo.run import best, dashboards
    from megatron_prepo.run import directory as run_directory

    run_directory.check_config_file(config.run, path)
    run_directory.check(config)
    dashboards.check(config.run)
    best.check(config.checkpoint, config.eval, config.data, config.selection)
    needed = run_directory.needs_initial_weights(config)
    preflight.check(run_directory.as_started(config), initial_weights=needed)
    run_directory.begin(config, _log)
    run_directory.end(Path(config.run.dir))  # rank 0 takes the lock, since it must not run twice


def _to_resume(directory: Path) -> str:
    from megatron_prepo.actor import checkpoint, manifest
    from megatron_prepo.run import opening

    found = checkpoint.by_step(directory / "checkpoints").items()
    return opening.to_resume(
        directory, [step for step, path in found if manifest.is_complete(path)]
    )


def train_rank(path: str | Path, overrides: Sequence[str]) -> int:
    """Train as the rank that RANK, WORLD_SIZE and so on name; returns its exit code."""

    def rank() -> None:
        from megatron_prepo.inputs import hub
        from megatron_prepo.run import directory as run_directory
        from megatron_prepo.run import opening
        from megatron_prepo.run import summary as report
        from megatron_prepo.train import train
        from megatron_prepo.train_async import train_overlapped

        config = configuration.load(path, overrides)
        needed = run_directory.needs_initial_weights(config)
        config = hub.resolved(config, weights=needed)
        run_directory.check_config_file(config.run, path)
        speaks = os.environ["RANK"] == "0"
        if speaks and local_ranks.ERROR_PIPE not in os.environ:  # otherwise the launcher has
            num_ranks = int(os.environ["WORLD_SIZE"])
            _log(opening.text(config, num_ranks=num_ranks, launched=False))
        summary = train_overlapped(config) if config.train.overlap else train(config)
        if speaks:
            print(report.text(summary))
            print(opening.next_steps(config.run.dir, config.lora))

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
