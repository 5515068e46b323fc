"""Rates of a run: a prediction for the run itself equals its measurement, stage by stage."""

import json

import pytest
import yaml
from rounding import approx

from megatron_prepo import config as configuration
from megatron_prepo.cli import main
from megatron_prepo.errors import UserError
from megatron_prepo.plan import measured_rates as measured
from megatron_prepo.plan import planner as plan
from tests.unit.plan.test_memory import DENSE

H100 = "NVIDIA H100 80GB HBM3"
STEP = {
    "rollout/tokens_paid": 32 * 40,
    "seconds/rollouts": 4.0,
    "seconds/old_logprobs": 2.0,
    "speed/old_logprobs_tokens": 32 * 64 / 2.0 / 2,  # per rank
    "seconds/update": 5.0,
    "speed/update_tokens": 32 * 64 / 5.0 / 2,
    "seconds/weight_sync": 0.5,
}
SLOWER = {key: value * 3 if key.startswith("seconds") else value for key, value in STEP.items()}


@pytest.fixture
def run(tmp_path):
    """Directory of a run on two GPUs: 8 prompts of 24 tokens, with 4 rollouts of 40 each."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(DENSE))
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"hf": str(tmp_path / "model")},
        "data": {"train": "absent", "eval": "absent", "max_prompt_tokens": 24},
        "selection": {"num_candidates": 16, "num_selected": 8},
        "rollout": {"max_new_tokens": 40, "samples_per_prompt": 4},
        "train": {"total_steps": 4, "micro_batch_tokens": 128},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    write(tmp_path, [SLOWER, STEP, STEP, STEP])
    return tmp_path


def write(run, steps: list[dict], device: str = H100) -> None:
    summary = {"ranks": 2, "machine": {"gpu": device}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def seconds(run, gpu: str, count: int) -> dict:
    config = configuration.load(run / "config.yaml")
    request = plan.PlanRequest(gpus=count, gpu=gpu, rates=measured.read_rates(run))
    return plan.make_plan(config, request).seconds


def test_what_was_measured_is_predicted_for_the_same_step(run):
    predicted = seconds(run, "h100", 2)
    for stage in ("rollouts", "old_logprobs", "update", "weight_sync"):
        assert predicted[stage] == approx((STEP[f"seconds/{stage}"],) * 2), stage
    # 16 prompts of 24 tokens, priced as scoring of 32 x 64
    assert predicted["perplexity"][0] == approx(2.0 * 16 * 24 / (32 * 64))


def test_a_pipelines_idle_time_is_counted_once(run):
    """32 sequences of 64 in rows of 128 are 16 micro-batches; of two stages, 1 in 16 is idle."""
    flat = seconds(run, "h100", 2)
    with (run / "config.yaml").open("a") as file:
        file.write("parallel: {pipeline: 2}\n")
    assert seconds(run, "h100", 2)["update"] == approx(flat["update"])
    rates = measured.read_rates(run)
    config = configuration.load(run / "config.yaml", ["parallel.pipeline=1"])
    without = plan.make_plan(config, plan.PlanRequest(gpus=2, rates=rates)).seconds
    assert without["update"][0] == approx(flat["update"][0] * 16 / 17)


def test_another_gpu_is_scaled_by_what_a_stage_waits_for(run):
    here, other = seconds(run, "h100", 2), seconds(run, "h200", 4)
    assert other["update"][0] == approx(here["update"][0] / 2)
    assert other["rollouts"][0] == approx(here["rollouts"][0] / 2 * 3.35 / 4.8)
    write(run, [STEP, STEP], "NVIDIA H200")
    back = seconds(run, "h100", 2)
    assert back["rollouts"][0] == approx(here["rollouts"][0] * 4.8 / 3.35)
    assert back["update"] == here["update"]


def test_the_output_says_whose_rates_they_are(run, capsys):
    words = ["plan", str(run / "config.yaml"), "--gpus", "2", "--rates", str(run)]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"rates measured: {run / 'model'} on 2 h100 ({run})" in said
    assert "published" not in said
    write(run, [STEP, SLOWER])
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layouts"][0]["seconds"] > 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda run: write(run, [STEP, STEP], "none"), "it ran on GPU 'none'"),
        (lambda run: write(run, [STEP]), "no step after the first"),
        (lambda run: (run / "summary.json").unlink(), "no summary.json; give the directory of a"),
        (
            lambda run: (run / "config.yaml").write_text(
                (run / "config.yaml").read_text() + "servers: {urls: ['http://a:1']}\n"
            ),
            "servers.urls were on GPUs that the run did not count",
        ),
    ],
)
def test_a_run_that_says_nothing_is_refused(run, change, expected):
    change(run)
    with pytest.raises(UserError, match=expected):
        measured.read_rates(run)
