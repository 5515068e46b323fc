"""When a run saves, and which of its checkpoints it keeps as the best."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megatron_prepo.actor import checkpoint, manifest
from megatron_prepo.config import CheckpointConfig
from megatron_prepo.errors import Stopped
from megatron_prepo.evaluation.held_out import Evaluation
from megatron_prepo.files import ownership
from megatron_prepo.process import progress
from megatron_prepo.run import directory as run_directory
from megatron_prepo.run.dashboards import Dashboards
from megatron_prepo.run.recorder import Run
from megatron_prepo.trainer import resume, setup
from megatron_prepo.trainer.resume import MAX_SHARE, is_affordable
from megatron_prepo.trainer.setup import Trainer
from tests.unit.run.test_run import ENTRY, METRICS
from tests.unit.run.test_run_directory import config, files  # noqa: F401 - a fixture


@pytest.mark.parametrize(
    ("step", "save", "num_steps"),
    [(2.0, 0.1, 1000), (2.0, 30.0, 1000), (600.0, 100.0, 100), (5000.0, 60.0, 20)],
    ids=["a laptop", "a slow disk", "7B", "long answers"],
)
def test_saving_takes_a_bounded_share_of_the_time_and_a_bounded_part_is_lost(step, save, num_steps):
    seconds, since, lost = {"rollouts": 0.0, "checkpoint": 0.0}, 0.0, []
    for number in range(1, num_steps + 1):
        seconds["rollouts"] += step
        since += step
        if is_affordable(seconds):
            seconds["checkpoint"] += save
            lost.append(since)
            since = 0.0
        assert number > 1 or lost == [step], "the first step is saved"
    share = seconds["checkpoint"] / sum(seconds.values())
    assert share <= MAX_SHARE + save / sum(seconds.values())
    assert max(lost) <= step + save / MAX_SHARE


@pytest.mark.parametrize(
    ("settings", "num_kept"),
    [({}, 2), ({"keep_last": 5}, 5), ({"every": 4}, None), ({"every": 4, "keep_last": 3}, 3)],
)
def test_checkpoints_of_a_chosen_interval_are_kept_as_before(settings, num_kept):
    assert CheckpointConfig(**settings).num_kept == num_kept


@pytest.mark.parametrize(
    ("settings", "minutes", "due"),
    [
        ({"every_minutes": 30}, 29.9, False),
        ({"every_minutes": 30}, 30.1, True),
        ({"every_minutes": 30, "every": 4}, 0.0, True),  # step 3 is the fourth
        ({"every_minutes": 30, "every": 5}, 0.0, False),
        ({"every_minutes": 30, "every": 0}, 31.0, True),
        ({"every": 5}, 1e6, False),
        ({"every_minutes": 30, "optimizer": False}, 31.0, True),
        ({}, 1e6, False),  # by its share of the time
    ],
)
def test_a_checkpoint_is_due_by_steps_or_by_rank_zeros_clock(monkeypatch, settings, minutes, due):
    now = 1000.0
    monkeypatch.setattr(setup.time, "monotonic", lambda: now)
    for clock_of_rank_zero in (None, not due):
        shared = lambda own, other=clock_of_rank_zero: own if other is None else other  # noqa: E731
        monkeypatch.setattr(setup.parallel, "from_rank_zero", shared)
        trainer = SimpleNamespace(
            config=SimpleNamespace(checkpoint=CheckpointConfig(**settings)),
            checkpoints=SimpleNamespace(saved_at=now - 60 * minutes),
            run=SimpleNamespace(seconds=SimpleNamespace(total={"checkpoint": 1.0, "update": 1.0})),
        )
        by_steps = settings.get("every") in (4, 5) and (due or "every_minutes" not in settings)
        expected = due if by_steps or clock_of_rank_zero is None else clock_of_rank_zero
        assert Trainer._checkpoint_is_due(trainer, step=3) == expected


class FakeActor:
    """Writes checkpoints without a model; `finish` of the pending one completes it."""

    updates = 0

    def start_saving(self, directory, *, step, run_state, copy):
        path = checkpoint.checkpoint_path(directory, step)

        def finish(timeout_minutes, check_directory):
            ownership.make_room(path, checkpoint.KIND, ownership.run_identity(path))
            ownership.create(path, ownership.UNFINISHED)
            (path / "run.json").write_text(run_state)
            listed = {"files": {"run.json": manifest.file_entry(path / "run.json")}}
            (path / manifest.MANIFEST).write_text(json.dumps(listed))
            ownership.seal(path, checkpoint.KIND)

        return SimpleNamespace(finish=finish, done=lambda: False)

    def load(self, path):
        pass


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start or resume a run of one rank with these settings of `checkpoint`."""
    monkeypatch.setattr(resume.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(resume.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(resume.parallel, "from_rank_zero", lambda value: value)
    monkeypatch.setattr(resume.parallel, "gather_to_all", lambda value: [value])
    begun = []

    def start(**settings):
        if begun:
            run_directory.end(begun[-1].directory)
        configured = config(tmp_path, checkpoint=settings, train={"total_steps": 99})
        run_directory.begin(configured, print)
        run = Run(configured, rank=0)
        run.bar = progress.bar(disable=True)
        begun.append(run)
        checkpoints = resume.Checkpoints(
            configured.checkpoint,
            run.directory / "checkpoints",
            FakeActor(),
            {"run": run},
            SimpleNamespace(forget=lambda before: None),
            run.log,
            timeout_minutes=1.0,
            best=run.best,
        )
        checkpoints.restore(resume.newest_checkpoint(run))
        return run, checkpoints

    yield start
    run_directory.end(begun[-1].directory)


def step_with(run, reward=0.5):
    run.record(run.num_steps, [ENTRY], METRICS | {"reward/mean": reward})


def save_if_due(run, checkpoints):
    """Save after the step as the loop does."""
    trainer = SimpleNamespace(
        run=run,
        checkpoints=checkpoints,
        stop=SimpleNamespace(anywhere=lambda: False),
        _checkpoint_is_due=lambda step: True,
    )
    Trainer.save_if_due(trainer, run.num_steps - 1)


def damage(run, step):
    """Change a byte of a checkpoint, which keeps its size."""
    path = checkpoint.checkpoint_path(run.directory / "checkpoints", step) / "run.json"
    path.write_text(path.read_text().replace("identity", "identitx", 1))


def evaluate(run, checkpoints, rate):
    found = Evaluation(torch.tensor([rate], dtype=torch.float64), samples_per_prompt=1)
    run.evaluate(lambda **_: found, "during", run.num_steps, samples=1)
    checkpoints.keep_if_best()


def named(run):
    path = run.directory / "checkpoints" / checkpoint.BEST
    return json.loads(path.read_text()) if path.exists() else None


def saved(checkpoints):
    return list(checkpoint.by_step(checkpoints.directory))


BY_PASS_RATE = {"every": 0, "keep_last": 1, "keep_best": "eval/pass_rate"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_best_evaluation_is_saved_and_outlives_later_checkpoints(start, asynchronous):
    run, checkpoints = start(**BY_PASS_RATE, asynchronous=asynchronous)
    rates = [0.25, 0.75, 0.5, float("nan"), 0.75]
    for rate in rates:
        step_with(run)
        evaluate(run, checkpoints, rate)
    checkpoints.finish()
    assert named(run) == {
        "checkpoint": "iter_0000002",
        "metric": "eval/pass_rate",
        "direction": "highest",
        "step": 2,
        "value": 0.75,
    }
    for _ in range(3):
        step_with(run)
        checkpoints.save()
    checkpoints.finish()
    assert saved(checkpoints) == [2, 8]
    step_with(run)
    evaluate(run, checkpoints, 1.0)
    checkpoints.finish()
    assert saved(checkpoints) == [9] and named(run)["step"] == 9


def test_until_the_best_is_complete_the_one_before_is_kept(start):
    run, checkpoints = start(**BY_PASS_RATE, asynchronous=True)
    for rate in (0.25, 0.75):
        step_with(run)
        evaluate(run, checkpoints, rate)
    assert saved(checkpoints) == [1]  # step 2 is pending
    run, checkpoints = start(**BY_PASS_RATE)  # it was killed
    assert named(run)["step"] == 1
    assert (run.num_steps, run.best.step, run.is_evaluated) == (1, 1, True)
    step_with(run)
    checkpoints.save()
    assert saved(checkpoints) == [1, 2]
    evaluate(run, checkpoints, 0.75)
    assert saved(checkpoints) == [1, 2] and named(run)["step"] == 2
    step_with(run)
    checkpoints.save()
    assert saved(checkpoints) == [2, 3]


def test_an_evaluation_that_the_checkpoint_includes_is_not_repeated(start):
    run, checkpoints = start(**BY_PASS_RATE)
    step_with(run)
    evaluate(run, checkpoints, 0.5)
    rows = (run.directory / "evaluations.jsonl").read_bytes()
    for settings in (BY_PASS_RATE, {"every": 0}):  # also when the best is no longer kept
        run, checkpoints = start(**settings)
        made = []
        trainer = SimpleNamespace(
            config=config(run.directory.parent, eval={"every": 1}),
            run=run,
            evaluate=lambda *when, made=made: made.append(when),
        )
        steps = Trainer.steps(trainer)
        assert next(steps) == 1
        steps.close()
        assert made == [] and (run.directory / "evaluations.jsonl").read_bytes() == rows


def test_saved_checkpoints_compete_by_a_metric_of_their_step(start):
    settings = {"every": 1, "keep_last": 1, "keep_best": "reward/mean", "best_is": "lowest"}
    run, checkpoints = start(**settings)
    for reward in (0.5, 0.125, 0.25):
        step_with(run, reward)
        save_if_due(run, checkpoints)
        evaluate(run, checkpoints, 0.0)
    assert saved(checkpoints) == [2, 3] and named(run)["value"] == 0.125
    run, checkpoints = start(**settings)
    assert (run.num_steps, run.best.step, run.best.value) == (3, 2, 0.125)
    step_with(run, 0.125)
    save_if_due(run, checkpoints)
    assert saved(checkpoints) == [2, 4]


def test_a_lost_best_is_saved_again_when_its_evaluation_is_repeated(start):
    run, checkpoints = start(**BY_PASS_RATE | {"keep_last": 2})
    step_with(run)
    checkpoints.save()
    step_with(run)
    evaluate(run, checkpoints, 0.5)
    shutil.rmtree(run.directory / "checkpoints" / "iter_0000002")
    run, checkpoints = start(**BY_PASS_RATE | {"keep_last": 2})
    assert (run.num_steps, run.best.step) == (1, None)
    step_with(run)
    evaluate(run, checkpoints, 0.5)
    assert saved(checkpoints) == [1, 2] and named(run)["step"] == 2


def test_the_best_is_kept_while_a_better_one_is_written(start):
    settings = {"every": 1, "keep_last": 1, "keep_best": "reward/mean", "asynchronous": True}
    run, checkpoints = start(**settings)
    for reward in (0.5, 0.25, 0.75):
        step_with(run, reward)
        save_if_due(run, checkpoints)
    assert saved(checkpoints) == [1, 2] and named(run)["step"] == 1
    checkpoints.finish()
    assert saved(checkpoints) == [3] and named(run)["step"] == 3


def test_the_time_since_a_checkpoint_is_from_its_beginning(start, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    run, checkpoints = start(every_minutes=30, asynchronous=True)
    assert checkpoints.saved_at == 100.0
    step_with(run)
    now[0] = 160.0
    checkpoints.save()
    now[0] = 200.0
    checkpoints.finish()
    assert checkpoints.saved_at == 160.0


def test_damaged_newer_checkpoints_do_not_count_as_the_newest(start):
    run, checkpoints = start(every=1, keep_last=4)
    for _ in range(4):
        step_with(run)
        checkpoints.save()
    damage(run, 3)
    damage(run, 4)
    run, checkpoints = start(every=1, keep_last=1)
    step_with(run)
    checkpoints.save()
    assert run.num_steps == 3 and saved(checkpoints) == [3, 4]
    step_with(run)
    checkpoints.save()
    assert saved(checkpoints) == [4] and start(every=1)[0].num_steps == 4


def test_a_damaged_newer_checkpoint_is_not_named_as_the_best(start):
    run, checkpoints = start(**BY_PASS_RATE | {"keep_last": 2})
    for rate in (0.5, 0.25):
        step_with(run)
        checkpoints.save()
        evaluate(run, checkpoints, rate)
    step_with(run)
    evaluate(run, checkpoints, 0.75)
    assert saved(checkpoints) == [2, 3]
    damage(run, 3)
    run, checkpoints = start(**BY_PASS_RATE, asynchronous=True)
    step_with(run)
    evaluate(run, checkpoints, 0.75)
    assert run.num_steps == 3 and named(run) is None
    checkpoints.finish()
    assert named(run)["step"] == 3 and start(**BY_PASS_RATE)[0].num_steps == 3


@pytest.mark.parametrize(
    "how", ["off", "another metric", "from the beginning", "a link", "of the user", "not JSON"]
)
def test_best_json_is_removed_when_what_it_names_is_not_kept_any_more(start, capsys, how):
    run, checkpoints = start(**BY_PASS_RATE)
    step_with(run)
    evaluate(run, checkpoints, 0.5)
    path = run.directory / "checkpoints" / checkpoint.BEST
    assert named(run)["step"] == 1
    if how == "from the beginning":
        shutil.rmtree(path.with_name("iter_0000001"))
    if how == "a link":
        path.rename(path.with_name("mine"))
        path.symlink_to("mine")
    texts = {"of the user": '{"step": 1}', "not JSON": "mine"}
    path.write_text(texts.get(how, path.read_text()))
    is_kept = how in ("a link", *texts)
    other = {"off": {"every": 0}, "from the beginning": BY_PASS_RATE}
    start(**other.get(how, {"every": 0, "keep_best": "reward/mean"}))
    assert path.exists() == is_kept and path.is_symlink() == (how == "a link")
    assert (f"removed {path}" in capsys.readouterr().err) != is_kept


def test_a_metric_that_the_run_never_has_is_logged_once_and_at_the_end(start, capsys):
    run, checkpoints = start(every=1, keep_best="reward/my_number")
    for _ in range(2):
        evaluate(run, checkpoints, 0.5)
        step_with(run)
        save_if_due(run, checkpoints)
    words = "checkpoint.keep_best=reward/my_number: "
    logged = capsys.readouterr().err
    assert logged.count(words) == 1 and f"{words}there is no such number after 1 steps" in logged
    run.finish(Evaluation(torch.tensor([0.5], dtype=torch.float64), 1), ranks=1)
    assert f"{words}no state that was compared had such a number" in capsys.readouterr().err


def test_a_metric_of_evaluations_is_not_missed_in_a_step(start, capsys):
    run, checkpoints = start(**BY_PASS_RATE | {"every": 1})
    step_with(run)
    save_if_due(run, checkpoints)
    evaluate(run, checkpoints, 0.5)
    assert "no such number" not in capsys.readouterr().err


@pytest.mark.parametrize("when", ["at the first sync", "after a step", "moved away", "failed"])
def test_dashboards_store_what_they_hold_when_the_run_is_stopped(start, tmp_path, when):
    run, checkpoints = start(every=0)
    got = []
    dashboard = SimpleNamespace(
        write=lambda step, metrics: got.append(step), close=lambda: got.append("closed")
    )
    run.dashboards = Dashboards({"It": dashboard}, pytest.fail)

    def stop(_: object = None) -> None:
        raise (RuntimeError if when == "failed" else partial(Stopped, exit_code=75))("it stops")

    trainer = SimpleNamespace(
        run=run,
        checkpoints=checkpoints,
        updates=None,
        _restore=stop if when == "at the first sync" else lambda parts: None,
    )
    with pytest.raises(RuntimeError, match="it stops"), Trainer.resumed(trainer):
        step_with(run)
        if when == "moved away":
            run.directory.rename(tmp_path / "moved")
        stop()
    if when == "moved away":
        (tmp_path / "moved").rename(run.directory)
    assert got == {"at the first sync": ["closed"], "after a step": [0, "closed"]}.get(when, [0])
