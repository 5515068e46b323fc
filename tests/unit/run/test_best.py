"""The best checkpoint by a metric: which values count, and which settings can never have one."""

import pytest

from megatron_prepo.config import CheckpointConfig
from megatron_prepo.errors import UserError
from megatron_prepo.run import best
from tests.unit.run.test_run_directory import config, files  # noqa: F401 - a fixture

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("direction", "values", "step"),
    [
        ("highest", [0.25, 0.5, 0.5, 0.375], 2),  # of two equal ones the first
        ("lowest", [0.25, 0.5, 0.125, 0.125], 3),
        ("highest", [NAN, None, 0.0, INFINITY, "0.9"], 3),
        ("lowest", [-INFINITY, -1, NAN], 2),
        ("highest", [None, NAN], None),
    ],
)
def test_the_first_of_the_best_finite_values(direction, values, step):
    found = best.Best("eval/pass_rate", direction)
    improved = [found.take(n, value) for n, value in enumerate(values, 1)]
    assert found.step == step
    assert [n for n, better in enumerate(improved, 1) if better][-1:] == ([step] if step else [])


def test_without_the_setting_nothing_is_kept():
    assert best.of(CheckpointConfig()) is None


def test_a_state_of_another_metric_or_direction_does_not_count():
    saved = {"metric": "eval/pass_rate", "direction": "highest", "step": 3, "value": 0.5}
    for settings, step in (
        ({"keep_best": "eval/pass_rate"}, 3),
        ({"keep_best": "eval/pass_rate", "best_is": "lowest"}, None),
        ({"keep_best": "reward/mean"}, None),
    ):
        found = best.of(CheckpointConfig(**settings))
        found.load_state_dict(saved)
        assert found.step == step


def check(tmp_path, metric: str, **evaluation) -> None:
    settings = config(
        tmp_path,
        checkpoint={"keep_best": metric},
        eval={"every": 2, "samples_per_prompt": 8, "samples_during": 2, **evaluation},
        data={
            "train": str(tmp_path / "train.jsonl"),
            "eval": {"easy": str(tmp_path / "eval.jsonl"), "hard": str(tmp_path / "eval.jsonl")},
        },
    )
    best.check(settings.checkpoint, settings.eval, settings.data, settings.selection)


def test_metrics_that_a_run_has(tmp_path):
    for metric in ("eval/pass_rate", "eval/hard/pass_rate", "eval/easy/pass_at_2"):
        check(tmp_path, metric, pass_at=[2, 8])
    for metric in ("reward/mean", "entropy/mean", "reward/my_number"):
        check(tmp_path, metric, every=0)


@pytest.mark.parametrize(
    ("metric", "evaluation", "words"),
    [
        ("eval/accuracy", {}, "have eval/pass_rate, eval/easy/pass_rate, eval/hard/pass_rate$"),
        ("eval/medium/pass_rate", {}, "eval/hard/pass_rate$"),
        ("eval/pass_at_8", {"pass_at": [2, 8]}, "samples_during=2 samples, have eval/pass_rate"),
        ("eval/pass_rate", {"every": 0}, "eval.every=0 asks for none; set it"),
        ("pass_rate", {}, r"no metric of a step \(docs/metrics.md lists them\)"),
        ("selection/mine", {}, "no metric of a step"),  # only a custom selector's
    ],
)
def test_metrics_that_a_run_would_never_have(tmp_path, metric, evaluation, words):
    with pytest.raises(UserError, match=f"^checkpoint.keep_best={metric}.*{words}"):
        check(tmp_path, metric, **evaluation)
