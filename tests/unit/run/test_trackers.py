"""Runs on MLflow, SwanLab and Trackio: by stand-ins, and by the libraries if installed."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from fake_trackers import FAKES

from megatron_prepo.errors import UserError
from megatron_prepo.files import ownership
from megatron_prepo.run import dashboards, texts
from megatron_prepo.run import directory as run_directory
from tests import tracker_session
from tests.e2e.laptop import REPOSITORY
from tests.tracker_session import EVALUATED, IDENTITY, ROLLED_OUT, SETTINGS, STORED
from tests.unit.run.test_run_directory import config, content, files  # noqa: F401 - a fixture


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A user who has set nothing and is not logged in anywhere."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "SWANLAB_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", {**os.environ, "HOME": str(tmp_path)})


@pytest.fixture
def fakes(monkeypatch):
    """Stand-ins for all three libraries."""
    made = {name: fake() for name, fake in FAKES.items()}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", made["mlflow"].entities)
    return made


def expected(name: str) -> dict:
    """Return STORED, with the names of metrics as MLflow has them."""
    if name != "mlflow":
        return STORED
    metrics = {key.replace("@", "_"): points for key, points in STORED["metrics"].items()}
    return STORED | {"metrics": metrics}


@pytest.mark.parametrize("first", ["begin", "stop"])
@pytest.mark.parametrize("name", FAKES)
def test_a_run_that_stops_and_resumes_is_one_run_with_evaluations_texts_and_picture(
    tmp_path, fakes, name, first
):
    for part in (first, "resume"):
        tracker_session.show(tmp_path / "run", name, part)
    stored = fakes[name].stored((tmp_path / "run").resolve() / name / IDENTITY)
    assert stored.as_json() == expected(name)


@pytest.mark.parametrize("first", ["begin", "stop"])
@pytest.mark.parametrize(
    "name", [pytest.param("mlflow", marks=pytest.mark.slow), "swanlab", "trackio"]
)
def test_the_library_stores_what_its_stand_in_does(tmp_path, name, first):
    """In processes of their own, as for a run: SwanLab and Trackio allow one run in each."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")

    def call(what: str) -> str:
        words = ["-m", "tests.tracker_session", str(tmp_path / "run"), name, what]
        done = subprocess.run(
            [sys.executable, *words],
            cwd=REPOSITORY,
            env={**os.environ, "SWANLAB_MODE": "offline", "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    call(first)
    call("resume")
    last = call("read").splitlines()[-1]
    assert json.loads(last) == expected(name)
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert kept == {ownership.MARKER, "pass_rate.png", name}, "nothing is stored elsewhere"
    assert [path.name for path in (tmp_path / "run" / name).iterdir()] == [IDENTITY]


@pytest.mark.parametrize("name", FAKES)
def test_what_it_stored_goes_with_a_run_that_is_overwritten(tmp_path, name):
    settings = config(tmp_path, run={"overwrite": True})
    run_directory.prepare(settings, print)
    run = run_directory.identity(tmp_path / "run")
    own = tmp_path / "run" / name / run
    own.mkdir(parents=True)
    (own / "data").touch()
    assert run_directory.to_remove(settings)[-1] == own.parent
    (own.parent / "mine").write_text("precious")
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match=f"{name}/mine in it is not known"):
        run_directory.prepare(settings, print)
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize(
    "place", ["mlflow/ID", "mlflow/ID/artifacts", "wandb/run-1", "wandb/run-2"]
)
def test_a_link_of_the_users_to_another_place_is_not_removed(tmp_path, place):
    settings = config(tmp_path, run={"overwrite": True})
    run_directory.prepare(settings, print)
    mine = tmp_path / "scratch"
    mine.mkdir()
    (mine / "data").write_text("precious")
    link = tmp_path / "run" / place.replace("ID", run_directory.identity(tmp_path / "run"))
    link.parent.mkdir(parents=True)
    if place.startswith("wandb"):
        (link.parent / "run_id").write_text("1")
    link.symlink_to(mine if place != "wandb/run-2" else "../../scratch")
    before = content(tmp_path)
    with pytest.raises(
        UserError, match=f"cannot be cleared, since {link.relative_to(tmp_path / 'run')}"
    ):
        run_directory.prepare(settings, print)
    assert content(tmp_path) == before and link.is_symlink()
    link.unlink()
    link.symlink_to("data")  # as of a dashboard itself
    run_directory.prepare(settings, print)
    assert not link.parent.exists() and (mine / "data").read_text() == "precious"


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(dashboards.importlib.util, "find_spec", lambda name: None)
    for name, setting in SETTINGS.items():
        words = rf'{setting} needs the package {name}: pip install -e ".\[{name}\]", or remove'
        with pytest.raises(UserError, match=words):
            dashboards.check(tracker_session.load(tmp_path, name).run)


def test_a_login_that_swanlab_lacks_is_named_before_anything_starts(fakes, monkeypatch, tmp_path):
    monkeypatch.setattr(dashboards.importlib.util, "find_spec", lambda name: name)
    run = tracker_session.load(tmp_path, "swanlab").run
    with pytest.raises(UserError, match=r"swanlab_project=mine: no SwanLab API key.*SWANLAB_MODE"):
        dashboards.check(run)
    monkeypatch.setenv("SWANLAB_MODE", "clod")
    with pytest.raises(UserError, match=r"swanlab_project=mine: .*Invalid mode: clod"):
        dashboards.check(run)
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    dashboards.check(run)
    monkeypatch.delenv("SWANLAB_MODE")
    monkeypatch.setenv("RANK", "1")  # rank 0 alone has dashboards
    dashboards.check(run)


def test_the_places_of_the_users_own_variables_are_used(fakes, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "all"))
    for name in ("mlflow", "trackio"):
        tracker_session.show(tmp_path / "run", name, "resume")
    [server] = fakes["mlflow"].stores
    assert server == "http://tracking:5000"
    assert fakes["mlflow"].stores[server].experiments["mine"].artifact_location is None
    assert fakes["trackio"].stored(tmp_path / "all").as_json()["runs"] == 1
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "20"


def test_a_store_of_mlflow_that_was_moved_is_not_written_at_its_old_place(fakes, tmp_path):
    tracker_session.show(tmp_path / "run", "mlflow", "begin")
    moved = (tmp_path / "moved").resolve()
    (tmp_path / "run").rename(moved)
    stores = fakes["mlflow"].stores
    [old] = stores
    stores[f"sqlite:///{moved / 'mlflow' / IDENTITY / 'mlflow.db'}"] = stores.pop(old)
    settings = tracker_session.load(moved, "mlflow")
    with pytest.raises(UserError, match=f"was moved here.*{tmp_path.name}/run/mlflow"):
        dashboards.opened(settings, pytest.fail)
    (moved / "metrics.jsonl").write_text('{"step": 0}\n')  # such a run must not be held up
    said = []
    dashboards.opened(settings, said.append).write(0, {"reward/mean": 1.0})
    assert len(said) == 1 and said[0].endswith("the run resumes without it")


class Broken:
    """A dashboard whose server is gone."""

    calls = 0

    def write(self, step, metrics):
        Broken.calls += 1
        raise ConnectionError("no route to host")

    write_texts = write

    def write_picture(self, step, path):
        pass

    def close(self):
        raise ConnectionError("no route to host")


def test_a_dashboard_that_fails_is_left_alone_for_a_while_and_ends_no_run(monkeypatch):
    now, said, got = [0.0], [], []
    monkeypatch.setattr(dashboards.time, "monotonic", lambda: now[0])
    sound = SimpleNamespace(write=lambda step, metrics: got.append(step))
    shown = dashboards.Dashboards({"Broken": Broken(), "Sound": sound}, said.append)
    for now[0], step in ((1.0, 0), (300.0, 1), (602.0, 2)):
        shown.write(step, {"reward/mean": 0.5})
    assert got == [0, 1, 2] and Broken.calls == 2
    reason = "ConnectionError: no route to host"
    assert said == [f"Broken failed, and gets nothing for 10 minutes: {reason}"] * 2


@pytest.mark.parametrize("hangs", ["write_picture", "close"])
def test_all_are_closed_within_a_time_also_those_that_failed_before(monkeypatch, tmp_path, hangs):
    said, got, released = [], [], threading.Event()

    def dashboard(**methods) -> SimpleNamespace:
        usual = {
            "write_picture": lambda step, path: got.append((step, path)),
            "close": lambda: got.append("closed"),
        }
        return SimpleNamespace(**usual | methods)

    silent = dashboard(write=Broken().write)
    waiting = dashboard(write=lambda step, metrics: None, **{hangs: lambda *_: released.wait()})
    opened = {"Waiting": waiting, "Broken": Broken(), "Silent": silent}
    shown = dashboards.Dashboards(opened, said.append)
    shown.write(0, {"reward/mean": 0.5})
    picture = (1, tmp_path / "pass_rate.png")
    del said[:]
    shown.close(0.2, picture)
    assert got.count(picture) == 1 + (hangs == "close") and "closed" in got
    lacks = "may lack the last values, which the run's files have"
    assert sorted(said) == [
        f"Waiting was not closed within 0.2 s, and {lacks}",
        f"closing Broken failed, and it {lacks}: ConnectionError: no route to host",
    ]
    codes = []
    monkeypatch.setattr(dashboards.os, "_exit", codes.append)
    dashboards.leave_if_closing(75)
    released.set()
    for thread in threading.enumerate():
        if thread.name.startswith(dashboards.CLOSING):
            thread.join()
    dashboards.leave_if_closing(75)
    assert codes == [75], "Python would wait for the library once more"


def test_rows_of_texts_have_the_same_columns_and_are_utf8():
    [row] = texts.rows("rollouts", ROLLED_OUT)
    assert row["completion"] == "5?" and row["answer"] is None and row["id"] == "b"
    assert {"reward", "advantage", "weight", "mean_entropy", "prompt"} < row.keys()
    [row] = texts.rows("evaluations", EVALUATED)
    assert list(row) == ["id", "reward", "tokens", "finished", "answer", "prompt", "completion"]
    assert texts.rows("evaluations", {"step": 0, "when": "after", "prompts": []}) == []
