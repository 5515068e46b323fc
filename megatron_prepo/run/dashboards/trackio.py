"""Trackio."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prepo.run.dashboards.base import Rows

OWN_PLACES = ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Variables by which a user chooses where runs are stored."""


class Trackio:
    """A run of Trackio, at OWN_PLACES or in `trackio/IDENTITY/`."""

    def __init__(
        self, directory: Path, identity: str, project: str, settings: dict[str, Any]
    ) -> None:
        if not any(os.environ.get(name) for name in OWN_PLACES):
            # read when Trackio is imported
            os.environ["TRACKIO_DIR"] = str(directory.resolve() / "trackio" / identity)
        import trackio

        # a run is resumed by its name, which other directories may have, too
        name = f"{directory.name}-{identity[:8]}"
        self._run = trackio.init(
            project=project, name=name, resume="allow", config=settings, embed=False
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store the numbers of a step; a step that is repeated is there twice."""
        self._run.log(dict(metrics), step=step)

    def write_texts(self, step: int, name: str, rows: Rows) -> None:
        """Store texts as a table."""
        import trackio

        columns = list(rows[0])
        table = trackio.Table(columns=columns, data=[list(row.values()) for row in rows])
        self._run.log({name: table}, step=step)

    def write_picture(self, step: int, path: Path) -> None:
        """Store a picture."""
        import trackio

        self._run.log({path.stem: trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        """Store what is waiting in memory."""
        self._run.finish()
