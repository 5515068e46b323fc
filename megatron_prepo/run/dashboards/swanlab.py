"""SwanLab."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_prepo.errors import UserError
from megatron_prepo.run.dashboards.base import Rows


class SwanLab:
    """A run of SwanLab, in `swanlab/IDENTITY/`; `SWANLAB_MODE=offline` keeps it there."""

    def __init__(
        self, directory: Path, identity: str, project: str, settings: dict[str, Any]
    ) -> None:
        import swanlab

        logs = directory / "swanlab" / identity
        logs.mkdir(parents=True, exist_ok=True)
        # not in the main thread: its run would handle Ctrl-C, and only that thread could close it
        with ThreadPoolExecutor(max_workers=1) as thread:
            self._run = thread.submit(
                swanlab.init,
                project=project,
                name=directory.name,
                id=identity,
                resume="allow",
                log_dir=str(logs),
                config=settings,
            ).result()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        self._run.log(dict(metrics), step=step)

    def write_texts(self, step: int, name: str, rows: Rows) -> None:
        """Send a text per row: the completion, with the other values as its caption."""
        import swanlab

        texts = [
            swanlab.Text(
                str(row["completion"]),
                caption=", ".join(f"{k} {v}" for k, v in row.items() if k != "completion"),
            )
            for row in rows
        ]
        self._run.log({name: texts}, step=step)

    def write_picture(self, step: int, path: Path) -> None:
        """Send a picture."""
        import swanlab

        self._run.log({path.stem: swanlab.Image(str(path))}, step=step)

    def close(self) -> None:
        """Finish the run of SwanLab."""
        self._run.finish()


def check_login(project: str) -> None:
    """Raise UserError if SwanLab would ask for a key."""
    import swanlab

    setting = f"run.swanlab_project={project}"
    try:
        settings = swanlab.Settings()
    except ValueError as error:  # of SWANLAB_* variables and swanlab.yaml
        raise UserError(f"{setting}: SwanLab's own settings are invalid: {error}") from error
    if settings.mode == "online" and not settings.api_key:
        raise UserError(
            f"{setting}: no SwanLab API key found; run `swanlab login`, set SWANLAB_API_KEY, or "
            "SWANLAB_MODE=offline"
        )
