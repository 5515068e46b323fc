"""Metrics on dashboards: read back by TensorBoard, kept by W&B without a network."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from rounding import approx

from megatron_prepo import config as configuration
from megatron_prepo.errors import UserError
from megatron_prepo.evaluation.held_out import Evaluation
from megatron_prepo.files import lock, ownership
from megatron_prepo.run import dashboards
from megatron_prepo.run.metrics_log import MetricsLog
from megatron_prepo.run.recorder import Run
from tests.e2e.laptop import REPOSITORY
from tests.tracker_session import ROLLED_OUT, draw

STEPS = [{"reward/mean": 0.25, "ppl/spearman_with_reward": None}, {"reward/mean": 0.5}]


def configured(directory, *overrides: str) -> configuration.Config:
    path = REPOSITORY / "examples" / "laptop" / "prepo.yaml"
    return configuration.load(path, [f"run.dir={directory}", *overrides])


@pytest.fixture(autouse=True)
def begun(tmp_path):
    """Directory of a run: marked, and locked by this process."""
    ownership.mark(tmp_path, ownership.RUN, identity="a1")
    with lock.held(tmp_path / lock.FILE, "it"):
        yield


def write(config: configuration.Config, steps: list[dict], first: int = 0) -> None:
    shown = dashboards.opened(config, pytest.fail)
    for step, metrics in enumerate(steps, first):
        shown.write(step, metrics)
    shown.close()


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """W&B as on a machine without a login; its state is reset afterwards."""
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield wandb
    wandb.teardown()


def test_tensorboard_reads_what_was_written_and_what_a_resumed_run_writes_anew(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configured(tmp_path, "run.tensorboard=true")
    write(config, [*STEPS, {"reward/mean": 0.9}])
    write(config, [{"reward/mean": 0.75}], first=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    points = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert points == [(0, 0.25), (1, 0.5), (2, 0.75)]
    assert all(path.name.endswith(".a1") for path in (tmp_path / "tensorboard").iterdir())


def test_wandb_keeps_the_run_in_its_directory_when_it_is_offline(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = configured(tmp_path, "run.wandb_project=mine")
    write(config, STEPS)
    wandb.teardown()  # its own process writes, and has ended by now
    [kept] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    assert b"reward/mean" in content and b"ppl/spearman_with_reward" not in content
    run_id = (tmp_path / "wandb" / "run_id").read_text()
    assert kept.name == f"run-{run_id}.wandb"
    assert dashboards.wandb._run_id(tmp_path / "wandb" / "run_id") == run_id, (
        "a resumed run is the same"
    )


def evaluate_and_record(config: configuration.Config) -> None:
    """Record the evaluation before a run of one step, the step, and the evaluation after it."""
    run = Run(config, rank=0)
    for step, passes in enumerate(([0.25, 0.5], [0.75, 1.0])):
        found = Evaluation(torch.tensor(passes, dtype=torch.float64), samples_per_prompt=4)
        run.evaluate(lambda found=found, **_: found, "during", step, samples=4)
        if step == 0:
            run.dashboards.write(0, STEPS[0])
    run.dashboards.write_texts("rollouts", ROLLED_OUT | {"step": 1})
    run.dashboards.close(picture=(1, draw(config.run.dir)))


def test_tensorboard_shows_evaluations(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluate_and_record(configured(tmp_path, "run.tensorboard=true"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    assert shown["reward/mean"] == [(0, 0.25)]
    assert shown["eval/pass_rate"] == [(0, 0.375), (1, 0.875)]
    assert shown["eval/samples_per_prompt"] == [(0, 4.0), (1, 4.0)]
    [text] = events.Tensors("texts/rollouts/text_summary")
    [markdown] = text.tensor_proto.string_val
    assert b"reward 1.0" in markdown and b"\n\n    5?" in markdown and text.step == 1
    [picture] = events.Images("pass_rate")
    assert (picture.width, picture.height) == (100, 100) and picture.step == 1
    lines = [json.loads(s) for s in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    for end, tag in enumerate(("eval/ci95_low", "eval/ci95_high")):
        assert [value for _, value in shown[tag]] == [
            approx(line["pass_rate_ci95"][end], 1, dtype=torch.float32) for line in lines
        ]


def test_wandb_gets_evaluations(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    evaluate_and_record(configured(tmp_path, "run.wandb_project=mine"))
    wandb.teardown()
    [kept] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    assert content.count(b"eval/pass_rate") >= 2 and b"reward/mean" in content
    [table] = kept.parent.glob("files/media/table/texts/rollouts_*.json")
    stored = json.loads(table.read_text())
    [row] = [dict(zip(stored["columns"], row, strict=True)) for row in stored["data"]]
    assert (row["completion"], row["mean_entropy"]) == ("5?", 0.5)
    [picture] = kept.parent.glob("files/media/images/pass_rate_*.png")
    assert picture.read_bytes() == (tmp_path / "pass_rate.png").read_bytes()


def test_a_dashboard_that_is_not_installed_is_refused_before_anything_starts(tmp_path, monkeypatch):
    dashboards.check(configured(tmp_path).run)
    monkeypatch.setattr(dashboards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run\.tensorboard=true needs the package tensorboard"):
        dashboards.check(configured(tmp_path, "run.tensorboard=true").run)
    with pytest.raises(UserError, match=r"run\.wandb_project=mine needs the package wandb"):
        dashboards.check(configured(tmp_path, "run.wandb_project=mine").run)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("WANDB_SILENT", "true", "no W&B API key found; run `wandb login`"),
        ("WANDB_API_KEY", "short", r"40\+ characters.*; run `wandb login`"),
        ("WANDB_API_KEY", 40 * "0", None),
        ("WANDB_MODE", "offline", None),
        ("WANDB_MODE", "disabled", None),
        ("RANK", "3", None),  # rank 0 alone writes
    ],
)
def test_a_login_that_is_missing_is_said_before_anything_starts(
    wandb, tmp_path, monkeypatch, variable, value, expected
):
    monkeypatch.setenv(variable, value)
    config = configured(tmp_path, "run.wandb_project=mine")
    if expected is None:
        dashboards.check(config.run)
    else:
        with pytest.raises(UserError, match=f"run.wandb_project=mine: .*{expected}"):
            dashboards.check(config.run)


def test_without_dashboards_there_is_the_file(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, metrics in enumerate(STEPS):
        log.write(step, metrics)
    log.close()
    write(configured(tmp_path), STEPS)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"step": 1, "reward/mean": 0.5}
    names = {path.name for path in tmp_path.iterdir()} - set(ownership.NOT_CONTENT)
    assert names == {"metrics.jsonl"}


def test_pass_at_k_is_recorded_for_the_ks_that_the_samples_allow(tmp_path):
    settings = ["eval.pass_at=[2, 8]", "eval.samples_per_prompt=8", "eval.top_p=0.9"]
    config = configured(tmp_path, *settings)
    shown = []
    run = Run(config, rank=0)
    run.dashboards = SimpleNamespace(write=lambda step, values: shown.append(values))
    for samples, passes in ((4, [0.25, 0.5]), (8, [0.75, 1.0])):
        found = Evaluation(torch.tensor(passes, dtype=torch.float64), samples)
        run.evaluate(lambda found=found, **_: found, "during", 0, samples=samples)
    lines = [json.loads(s) for s in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [list(line["pass_at"]) for line in lines] == [["2"], ["2", "8"]]
    assert lines[0]["pass_at"]["2"]["mean"] == approx((1 / 2 + 5 / 6) / 2)
    assert [line["top_p"] for line in lines] == [0.9, 0.9] and "top_k" not in lines[0]
    assert shown[1]["eval/pass_at_8"] == 1.0 and "eval/pass_at_8" not in shown[0]
