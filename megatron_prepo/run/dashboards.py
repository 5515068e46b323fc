"""Dashboards that show the metrics of a run: TensorBoard and Weights & Biases.

Both keep their files in the run's directory, and continue them when the run is resumed.
"""

import importlib.util
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prepo.config import Config, RunConfig, to_tree
from megatron_prepo.errors import UserError
from megatron_prepo.run import directory as run_directory


def check(run: RunConfig) -> None:
    """Raise UserError if a configured dashboard lacks its package or, on rank 0, its login."""
    for setting, wanted, package in (
        ("run.tensorboard=true", run.tensorboard, "tensorboard"),
        (f"run.wandb_project={run.wandb_project}", run.wandb_project, "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(
                f'{setting} needs the package {package}: pip install -e ".[{package}]", or '
                "remove the setting"
            )
    if run.wandb_project and os.environ.get("RANK", "0") == "0":
        _check_login(run.wandb_project)


def _check_login(project: str) -> None:
    import wandb

    remedy = "run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
    if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
        return
    try:
        found = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise UserError(f"run.wandb_project={project}: {error}; {remedy}") from error
    if not found:
        raise UserError(f"run.wandb_project={project}: no W&B API key found; {remedy}")


def dashboards(config: Config) -> "list[TensorBoard | WandB]":
    """Return the dashboards that the section `run` names."""
    directory = Path(config.run.dir)
    found: list[TensorBoard | WandB] = []
    if config.run.tensorboard:
        identity = run_directory.identity(directory)
        assert identity is not None, f"{directory} is marked before anything else is written to it"
        found.append(TensorBoard(directory, identity))
    if config.run.wandb_project:
        found.append(WandB(directory, config))
    return found


class TensorBoard:
    """Event files in `tensorboard/`: `tensorboard --logdir RUN`.

    Their names end with the run's identity, unlike other programs' event files.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        self._directory, self._suffix = directory / "tensorboard", identity
        self._writer: Any = None

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Write the numbers of a step; they are on disk when the method returns."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # hides the steps that an interrupted run wrote after its last checkpoint
            self._writer = SummaryWriter(
                str(self._directory), purge_step=step, filename_suffix=f".{self._suffix}"
            )
        for name, value in metrics.items():
            if is_number(value):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A run of Weights & Biases, in `wandb/`; `WANDB_MODE=offline` keeps it there."""

    def __init__(self, directory: Path, config: Config) -> None:
        import wandb

        self._run = wandb.init(
            project=config.run.wandb_project,
            name=directory.name,
            id=_run_id(directory / "wandb" / "run_id"),
            resume="allow",
            dir=str(directory),
            config=to_tree(config),
        )

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Send the numbers of a step; W&B ignores steps that it has already received."""
        self._run.log({k: v for k, v in metrics.items() if is_number(v)}, step=step)

    def close(self) -> None:
        """Finish the run of W&B."""
        self._run.finish()


def is_number(value: object) -> bool:
    """Return whether a dashboard can draw the value.

    >>> is_number(2), is_number(0.5), is_number(None), is_number(float("nan")), is_number([1])
    (True, True, False, False, False)
    """
    return isinstance(value, int | float) and math.isfinite(value)


def _run_id(path: Path) -> str:
    """Return the W&B id of the run, which a resumed run keeps."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text()
