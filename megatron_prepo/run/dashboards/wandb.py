"""Weights & Biases."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prepo.errors import UserError
from megatron_prepo.run.dashboards.base import Rows


class WandB:
    """A run of Weights & Biases, in `wandb/`; `WANDB_MODE=offline` keeps it there."""

    def __init__(
        self, directory: Path, identity: str, project: str, settings: dict[str, Any]
    ) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            name=directory.name,
            id=_run_id(directory / "wandb" / "run_id"),
            resume="allow",
            dir=str(directory),
            config=settings,
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the numbers of a step; W&B ignores steps that it has already received."""
        self._run.log(dict(metrics), step=step)

    def write_texts(self, step: int, name: str, rows: Rows) -> None:
        """Send texts as a table."""
        import wandb

        columns = list(rows[0])
        table = wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
        self._run.log({name: table}, step=step)

    def write_picture(self, step: int, path: Path) -> None:
        """Send a picture."""
        import wandb

        self._run.log({path.stem: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Finish the run of W&B."""
        self._run.finish()


def check_login(project: str) -> None:
    """Raise UserError if W&B would ask for a key."""
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


def _run_id(path: Path) -> str:
    """Return the W&B id of the run, which a resumed run keeps."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text()
