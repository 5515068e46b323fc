"""Stand-ins for MLflow, SwanLab and Trackio: the part of their interfaces that we call.

`test_trackers.py` compares what they store with what the real libraries store.
"""

import os
from pathlib import Path
from types import ModuleType, SimpleNamespace

from tests.tracker_session import Stored


class FakeMLflow(ModuleType):
    """The module `mlflow`, and `mlflow.entities`."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        stores: dict[str, SimpleNamespace] = {}
        self.stores = stores
        self.entities = ModuleType("mlflow.entities")
        self.entities.Param = lambda key, value: (key, value)
        self.entities.Metric = lambda key, value, timestamp, step: (key, value, step)

        class MlflowClient:
            def __init__(self, tracking_uri):
                empty = SimpleNamespace(experiments={}, runs={})
                self.store = stores.setdefault(tracking_uri, empty)

            def get_experiment_by_name(self, name):
                return self.store.experiments.get(name)

            def create_experiment(self, name, artifact_location=None):
                made = SimpleNamespace(experiment_id="1", artifact_location=artifact_location)
                self.store.experiments[name] = made
                return made.experiment_id

            def search_runs(self, experiment_ids, filter_string):
                assert experiment_ids == ["1"]
                key, value = filter_string.removeprefix("tags.").split(" = ")
                tag = (key.strip("`"), value.strip("'"))
                return [run for run in self.store.runs.values() if tag in run.tags.items()]

            def create_run(self, experiment_id, run_name, tags):
                info = SimpleNamespace(run_id=f"run{len(self.store.runs)}")
                made = SimpleNamespace(info=info, tags=tags, params={}, stored=Stored())
                made.name, made.status = run_name, "RUNNING"
                self.store.runs[info.run_id] = made
                made.stored.runs.add(info.run_id)
                return made

            def update_run(self, run_id, status):
                self.store.runs[run_id].status = status

            def log_batch(self, run_id, metrics=(), params=()):
                assert len(params) <= 100
                run = self.store.runs[run_id]
                run.params.update(params)
                for key, value, step in metrics:
                    assert "@" not in key, "MLflow refuses such names"
                    run.stored.metrics[key].add((step, value))

            def log_dict(self, run_id, dictionary, artifact_file):
                name, _, step = artifact_file.removesuffix(".json").rpartition("/step_")
                column = dictionary["columns"].index("completion")
                texts = [row[column] for row in dictionary["data"]]
                self.store.runs[run_id].stored.texts[name][str(int(step))] = texts

            def log_artifact(self, run_id, local_path):
                self.store.runs[run_id].stored.pictures.add(Path(local_path).stem)

            def set_terminated(self, run_id):
                self.store.runs[run_id].status = "FINISHED"

        self.MlflowClient = MlflowClient

    def stored(self, place: Path) -> Stored:
        [run] = self.stores[f"sqlite:///{place / 'mlflow.db'}"].runs.values()
        assert run.status == "FINISHED" and run.params["selection.num_selected"] == "32"
        return run.stored


class FakeRun:
    """A run of SwanLab or Trackio."""

    def __init__(self, name: str) -> None:
        self.name, self.stored, self.finished = name, Stored(), False
        self.stored.runs.add(name)

    def log(self, data, step):
        for key, value in data.items():
            if isinstance(value, Path):
                self.stored.pictures.add(key)
            elif isinstance(value, list):
                self.stored.texts[key][str(step)] = list(value)
            else:
                self.stored.metrics[key].add((step, value))

    def finish(self):
        self.finished = True


class FakeSwanLab(ModuleType):
    """The module `swanlab`."""

    Image = Path

    def __init__(self) -> None:
        super().__init__("swanlab")
        self.runs: dict[tuple[str, str], FakeRun] = {}

    def init(self, *, project, name, id, resume, log_dir, config):
        assert resume == "allow" and project == "mine" and config["selection"]
        return self.runs.setdefault((log_dir, id), FakeRun(id))

    @staticmethod
    def Text(data, caption):
        assert "prompt" in caption and "reward" in caption
        return data

    @staticmethod
    def Settings():
        mode = os.environ.get("SWANLAB_MODE", "online")
        if mode not in ("online", "offline", "local", "disabled"):
            raise ValueError(f"Invalid mode: {mode}")
        return SimpleNamespace(mode=mode, api_key=os.environ.get("SWANLAB_API_KEY"))

    def stored(self, place: Path) -> Stored:
        [run] = (run for (where, _), run in self.runs.items() if where == str(place))
        assert run.finished
        return run.stored


class FakeTrackio(ModuleType):
    """The module `trackio`."""

    Image = Path

    def __init__(self) -> None:
        super().__init__("trackio")
        self.runs: dict[tuple[str, str], FakeRun] = {}

    def init(self, *, project, name, resume, config, embed):
        assert (project, resume, embed) == ("mine", "allow", False)
        return self.runs.setdefault((os.environ["TRACKIO_DIR"], name), FakeRun(name))

    @staticmethod
    def Table(columns, data):
        return [row[columns.index("completion")] for row in data]

    def stored(self, place: Path) -> Stored:
        [run] = (run for (where, _), run in self.runs.items() if where == str(place))
        assert run.finished
        return run.stored


FAKES = {"mlflow": FakeMLflow, "swanlab": FakeSwanLab, "trackio": FakeTrackio}
