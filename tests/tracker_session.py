"""A run as a tracker shows it, which stops once and is resumed, and what the tracker stored of it.

    python -m tests.tracker_session DIRECTORY NAME begin|stop|resume    # one process each
    python -m tests.tracker_session DIRECTORY NAME read            # prints what is stored, as JSON

The readers look into files of the real libraries; `fake_trackers.py` has stand-ins.
"""

import json
import os
import sqlite3
import sys
from collections import defaultdict
from pathlib import Path

from megatron_prepo import config as configuration
from megatron_prepo.files import ownership
from megatron_prepo.run import dashboards

LAPTOP = Path(__file__).resolve().parent.parent / "examples" / "laptop" / "prepo.yaml"
IDENTITY = "0123456789abcdef0123456789abcdef"
SETTINGS = {
    "mlflow": "run.mlflow_experiment=mine",
    "swanlab": "run.swanlab_project=mine",
    "trackio": "run.trackio_project=mine",
}
COMPLETION = {"text": "4\n| <b>", "reward": 1.0, "tokens": 2, "finished": True}
EVALUATED = {
    "step": 0,
    "when": "before",
    "prompts": [{"id": "a", "text": "2+2?", "answer": "4", "completions": [COMPLETION]}],
}
ROLLOUT = COMPLETION | {
    "text": "5\ud800",
    "advantage": None,
    "weight": None,
    "mean_entropy": 0.5,
}
ROLLED_OUT = {
    "step": 2,
    "prompts": [{"id": "b", "text": "2+3?", "answer": None, "rollouts": [ROLLOUT]}],
}
STORED = {
    "runs": 1,
    "metrics": {
        "eval/pass_rate": [[0, 0.375], [2, 0.5]],
        "reward/exact@1": [[0, 0.25], [1, 0.5], [2, 0.75]],
    },
    "texts": {"texts/evaluations": {"0": ["4\n| <b>"]}, "texts/rollouts": {"2": ["5?"]}},
    "pictures": ["pass_rate"],
}
"""What each tracker has in the end; a step that the resumed run repeats counts once."""


def load(directory: Path, name: str) -> configuration.Config:
    return configuration.load(LAPTOP, [f"run.dir={directory}", SETTINGS[name]])


def fail(line: str) -> None:
    """End the process, also from a thread, where `sys.exit` ends only that."""
    print(line, file=sys.stderr, flush=True)
    os._exit(1)


def show(directory: Path, name: str, part: str) -> None:
    """Show the part of the run before a kill (`begin`) or a stop, or after it."""
    directory.mkdir(exist_ok=True)
    ownership.mark(directory, ownership.RUN, identity=IDENTITY)
    shown = dashboards.opened(load(directory, name), fail)
    if part != "resume":
        shown.write(0, {"eval/pass_rate": 0.375})
        shown.write_texts("evaluations", EVALUATED)
        shown.write(0, {"reward/exact@1": 0.25, "ppl/spearman_with_reward": None})
        shown.write(1, {"reward/exact@1": 0.5})
        if part == "stop":
            shown.close()
        return
    shown.write(1, {"reward/exact@1": 0.5})  # was made after the last checkpoint
    shown.write(2, {"reward/exact@1": 0.75, "entropy/max": float("inf")})
    shown.write_texts("rollouts", ROLLED_OUT)
    shown.write(2, {"eval/pass_rate": 0.5})
    shown.close(picture=(2, draw(directory)))


def draw(directory: Path | str) -> Path:
    """Draw 100 by 100 pixels, and return their file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1, 1))
    axes.plot([0, 1])
    path = Path(directory) / "pass_rate.png"
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


class Stored:
    """What was read, in the form of STORED."""

    def __init__(self) -> None:
        self.runs: set[str] = set()
        self.metrics: dict[str, set[tuple[int, float]]] = defaultdict(set)
        self.texts: dict[str, dict[str, list[str]]] = defaultdict(dict)
        self.pictures: set[str] = set()

    def as_json(self) -> dict:
        return {
            "runs": len(self.runs),
            "metrics": {k: sorted(map(list, v)) for k, v in sorted(self.metrics.items())},
            "texts": {name: dict(by_step) for name, by_step in sorted(self.texts.items())},
            "pictures": sorted(self.pictures),
        }


def read_mlflow(place: Path) -> Stored:
    import mlflow

    found, client = Stored(), mlflow.MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mine").experiment_id
    for run in client.search_runs([experiment]):
        assert run.info.status == "FINISHED"
        assert run.data.params["selection.num_selected"] == "32"
        found.runs.add(run.info.run_id)
        artifacts = place / "artifacts" / run.info.run_id / "artifacts"
        for key in run.data.metrics:
            for point in client.get_metric_history(run.info.run_id, key):
                found.metrics[key].add((point.step, point.value))
        for path in artifacts.glob("texts/*/step_*.json"):
            table = json.loads(path.read_text())
            column = table["columns"].index("completion")
            texts = found.texts[f"texts/{path.parent.name}"]
            texts[str(int(path.stem[5:]))] = [row[column] for row in table["data"]]
        found.pictures |= {path.stem for path in artifacts.glob("*.png")}
    return found


def read_swanlab(place: Path) -> Stored:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found = Stored()
    for file in sorted(place.glob("run-*/run-*.swanlab")):
        reader = DataStoreReader()
        reader.open(file)
        for content in reader:
            record = Record.FromString(content)
            if record.HasField("start"):
                found.runs.add(record.start.id)
            if record.HasField("scalar"):
                number = record.scalar.value.number
                found.metrics[record.scalar.key].add((record.scalar.step, number))
            if record.HasField("media"):
                names = [item.filename for item in record.media.value.items]
                if names[0].endswith(".png"):
                    assert (file.parent / "media" / "image" / names[0]).is_file()
                    found.pictures.add(record.media.key)
                else:
                    texts = [(file.parent / "media" / "text" / n).read_text() for n in names]
                    found.texts[record.media.key][str(record.media.step)] = texts
    return found


def read_trackio(place: Path) -> Stored:
    found = Stored()
    with sqlite3.connect(place / "mine.db") as database:
        rows = database.execute("SELECT run_id, step, metrics FROM metrics").fetchall()
    for run, step, metrics in rows:
        found.runs.add(run)
        for key, value in json.loads(metrics).items():
            if not isinstance(value, dict):
                found.metrics[key].add((step, value))
            elif value["_type"] == "trackio.table":
                texts = [row["completion"] for row in value["_value"]]
                found.texts[key][str(step)] = texts
            else:
                assert (place / "media" / value["file_path"]).is_file()
                found.pictures.add(key)
    return found


READERS = {"mlflow": read_mlflow, "swanlab": read_swanlab, "trackio": read_trackio}


if __name__ == "__main__":
    _, where, tracker, what = sys.argv
    if what == "read":
        stored = READERS[tracker](Path(where) / tracker / IDENTITY)
        print(json.dumps(stored.as_json()))
    else:
        show(Path(where), tracker, what)
