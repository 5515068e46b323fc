"""MLflow."""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prepo.errors import UserError
from megatron_prepo.run.dashboards.base import Rows

IDENTITY = "megatron_prepo.run"
"""Tag by which a resumed run finds its run of MLflow."""
PARAMETERS_PER_CALL = 100
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""Bounds of a call to a server, for which all ranks wait; by default MLflow tries for minutes."""


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in `mlflow/IDENTITY/mlflow.db`."""

    def __init__(
        self, directory: Path, identity: str, experiment: str, settings: dict[str, Any]
    ) -> None:
        import mlflow

        os.environ.update(
            {name: value for name, value in PATIENCE.items() if name not in os.environ}
        )
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            store = directory.resolve() / "mlflow" / identity
            store.mkdir(parents=True, exist_ok=True)
            uri, artifacts = f"sqlite:///{store / 'mlflow.db'}", (store / "artifacts").as_uri()
        self._client = mlflow.MlflowClient(uri)
        found = self._client.get_experiment_by_name(experiment)
        number = (
            found.experiment_id
            if found
            else self._client.create_experiment(experiment, artifact_location=artifacts)
        )
        if artifacts and found and found.artifact_location != artifacts:
            raise UserError(
                f"{uri} was moved here, and MLflow would store pictures and texts at the old "
                f"place, {found.artifact_location}"
            )
        self._run = self._resume(number, identity) or self._begin(
            number, identity, directory.name, settings
        )

    def _resume(self, experiment: str, identity: str) -> str | None:
        """Return the id of the run that this one resumes; None if there is none."""
        tag = f"tags.`{IDENTITY}` = '{identity}'"
        for run in self._client.search_runs([experiment], tag):
            self._client.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id)
        return None

    def _begin(self, experiment: str, identity: str, name: str, settings: dict[str, Any]) -> str:
        """Create a run with the settings as its parameters, which MLflow never changes."""
        from mlflow.entities import Param

        run = self._client.create_run(experiment, run_name=name, tags={IDENTITY: identity})
        found = [
            Param(f"{section}.{key}", str(value))
            for section, values in settings.items()
            for key, value in values.items()
        ]
        for first in range(0, len(found), PARAMETERS_PER_CALL):
            some = found[first : first + PARAMETERS_PER_CALL]
            self._client.log_batch(run.info.run_id, params=some)
        return str(run.info.run_id)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store the numbers of a step; a step that is repeated is there twice."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(_name(name), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=points)

    def write_texts(self, step: int, name: str, rows: Rows) -> None:
        """Store texts as a table, `NAME/step_N.json` of the run's artifacts."""
        table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
        self._client.log_dict(self._run, table, f"{name}/step_{step:07d}.json")

    def write_picture(self, step: int, path: Path) -> None:
        """Store the picture among the run's artifacts."""
        self._client.log_artifact(self._run, str(path))

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


def _name(metric: str) -> str:
    """Return the name without characters that MLflow refuses.

    >>> _name("reward/mean"), _name("reward/exact@1")
    ('reward/mean', 'reward/exact_1')
    """
    return re.sub(r"[^\w.:/ -]", "_", metric)
