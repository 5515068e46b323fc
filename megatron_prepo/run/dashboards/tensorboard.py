"""TensorBoard."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prepo.run.dashboards.base import Rows


class TensorBoard:
    """Event files in `tensorboard/`: `tensorboard --logdir RUN`.

    Their names end with the run's identity, unlike other programs' event files.
    """

    def __init__(self, directory: Path, identity: str, _: object, settings: dict[str, Any]) -> None:
        self._directory, self._suffix = directory / "tensorboard", identity
        self._opened: Any = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the numbers of a step; they are on disk when the method returns."""
        for name, value in metrics.items():
            self._writer(step).add_scalar(name, value, step)
        self._writer(step).flush()

    def write_texts(self, step: int, name: str, rows: Rows) -> None:
        """Write texts as Markdown."""
        self._writer(step).add_text(name, _markdown(rows), step)

    def write_picture(self, step: int, path: Path) -> None:
        """Write the picture's pixels."""
        from matplotlib import image

        pixels_HWC = image.imread(path)
        self._writer(step).add_image(path.stem, pixels_HWC, step, dataformats="HWC")

    def close(self) -> None:
        """Close the event file."""
        if self._opened is not None:
            self._opened.close()

    def _writer(self, step: int) -> Any:
        if self._opened is None:
            from torch.utils.tensorboard import SummaryWriter

            # hides the steps that an interrupted run wrote after its last checkpoint
            self._opened = SummaryWriter(
                str(self._directory), purge_step=step, filename_suffix=f".{self._suffix}"
            )
        return self._opened


def _markdown(rows: Rows) -> str:
    """Return rows as paragraphs of short values, and code for those of several words or lines."""
    parts = []
    for row in rows:
        values = {name: str(value) for name, value in row.items()}
        texts = ("prompt", "completion")
        parts.append(", ".join(f"{name} {values[name]}" for name in values if name not in texts))
        parts += [textwrap.indent(values[name], "    ", lambda line: True) for name in texts]
    return "\n\n".join(parts)
