"""Dashboards that show a run: one file per dashboard; `base.py` has their interface.

Only rank 0 has any.  Each keeps its files in the run's directory unless its own environment
variables name another place, and a resumed run continues the same run of it.
"""

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_prepo.config import Config, RunConfig, to_tree
from megatron_prepo.errors import UserError
from megatron_prepo.process import activity
from megatron_prepo.run import directory as run_directory
from megatron_prepo.run import texts
from megatron_prepo.run.dashboards import mlflow, swanlab, trackio, wandb
from megatron_prepo.run.dashboards.base import Dashboard, numbers
from megatron_prepo.run.dashboards.tensorboard import TensorBoard

RETRY_SECONDS = 600.0
"""Seconds for which a dashboard that failed gets nothing: all ranks wait for each call."""
CLOSE_SECONDS = 120.0
"""Time for closing all dashboards of a finished run."""
STOP_SECONDS = 30.0
"""The same for a run that is stopped; its launcher kills it LEAVING_SECONDS after other ranks."""
CLOSING = "close "
"""Beginning of the names of the threads that close dashboards."""
MAY_LACK = "may lack the last values, which the run's files have"


class Kind(NamedTuple):
    """A dashboard that the section `run` may ask for."""

    setting: str
    """Name of its setting in the section, which begins with the name of its package."""
    open: Callable[[Path, str, str, dict[str, Any]], Dashboard]
    """Opens it, given the run's directory and identity, the setting's value and all settings."""
    check_login: Callable[[str], None] | None = None
    """Raises UserError if it would ask for a login."""

    @property
    def package(self) -> str:
        """Name of its package, and of the extra that installs it."""
        return self.setting.partition("_")[0]


KINDS = {
    "TensorBoard": Kind("tensorboard", TensorBoard),
    "Weights & Biases": Kind("wandb_project", wandb.WandB, wandb.check_login),
    "MLflow": Kind("mlflow_experiment", mlflow.MLflow),
    "SwanLab": Kind("swanlab_project", swanlab.SwanLab, swanlab.check_login),
    "Trackio": Kind("trackio_project", trackio.Trackio),
}


def wanted(run: RunConfig) -> dict[str, Kind]:
    """Return the dashboards that the section asks for, by name."""
    return {name: kind for name, kind in KINDS.items() if getattr(run, kind.setting)}


def check(run: RunConfig) -> None:
    """Raise UserError if a configured dashboard lacks its package or, on rank 0, its login."""
    for kind in wanted(run).values():
        value = getattr(run, kind.setting)
        if importlib.util.find_spec(kind.package) is None:
            shown = "true" if value is True else value
            raise UserError(
                f"run.{kind.setting}={shown} needs the package {kind.package}: "
                f'pip install -e ".[{kind.package}]", or remove the setting'
            )
        if kind.check_login and os.environ.get("RANK", "0") == "0":
            kind.check_login(value)


class Dashboards:
    """The open dashboards of a run, by name.

    One that raises is logged and gets nothing for RETRY_SECONDS: it must not end a run, whose files
    have all that it shows.
    """

    def __init__(self, opened: dict[str, Dashboard], log: Callable[[str], None]) -> None:
        self._opened, self._log = opened, log
        self._silent_until = dict.fromkeys(opened, 0.0)

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Show the numbers of a step, or of an evaluation after `step` steps."""
        shown = numbers(metrics)
        self._on_each(lambda dashboard: dashboard.write(step, shown))

    def write_texts(self, kind: texts.Kind, line: Mapping[str, Any]) -> None:
        """Show the texts that a step or an evaluation keeps, given their line."""
        if rows := texts.rows(kind, line):
            name = f"{texts.FOLDER}/{kind}"
            self._on_each(lambda dashboard: dashboard.write_texts(line["step"], name, rows))

    def close(
        self, seconds: float = CLOSE_SECONDS, picture: tuple[int, Path] | None = None
    ) -> None:
        """Show a last picture, a step and a PNG file, and close all, also those that failed.

        Waits `seconds` at most; a dashboard that takes longer is logged and closed by a thread, for
        which `leave_if_closing` does not wait.
        """
        threads = {
            name: threading.Thread(
                target=self._close, args=(name, picture), name=f"{CLOSING}{name}", daemon=True
            )
            for name in self._opened
        }
        end = time.monotonic() + seconds
        for thread in threads.values():
            thread.start()
        for name, thread in threads.items():
            with activity.doing(f"closing {name}"):
                thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                self._log(f"{name} was not closed within {seconds:g} s, and {MAY_LACK}")

    def _close(self, name: str, picture: tuple[int, Path] | None) -> None:
        dashboard = self._opened[name]
        try:
            try:
                if picture:
                    dashboard.write_picture(*picture)
            finally:
                dashboard.close()
        except Exception as error:  # of any type, from a library or a server
            self._log(f"closing {name} failed, and it {MAY_LACK}: {type(error).__name__}: {error}")

    def _on_each(self, call: Callable[[Dashboard], None]) -> None:
        for name, dashboard in self._opened.items():
            if time.monotonic() < self._silent_until[name]:
                continue
            try:
                call(dashboard)
            except Exception as error:  # of any type, from a library or a server
                self._silent_until[name] = time.monotonic() + RETRY_SECONDS
                self._log(
                    f"{name} failed, and gets nothing for {RETRY_SECONDS / 60:.0f} minutes: "
                    f"{type(error).__name__}: {error}"
                )


def opened(config: Config, log: Callable[[str], None]) -> Dashboards:
    """Open the dashboards that the section `run` names.

    Raises UserError if one cannot be opened, unless the run has made steps: then it is only logged.
    """
    directory, found = Path(config.run.dir), {}
    identity = run_directory.identity(directory)
    assert identity is not None, f"{directory} is marked before anything else is written to it"
    for name, kind in wanted(config.run).items():
        value = getattr(config.run, kind.setting)
        try:
            found[name] = kind.open(directory, identity, value, to_tree(config))
        except Exception as error:  # of any type, from a library or a server
            problem = f"run.{kind.setting}={value}: {name} cannot be opened: {error}"
            if not run_directory.has_made_a_step(directory):
                raise UserError(f"{problem}; fix that, or remove the setting") from error
            log(f"{problem}; the run resumes without it")
    return Dashboards(found, log)


def leave_if_closing(code: int) -> None:
    """Exit the process with this code if a dashboard is still being closed.

    Otherwise its library would wait for the same again before Python exits.
    """
    if any(thread.name.startswith(CLOSING) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
