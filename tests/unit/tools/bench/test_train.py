"""The step's benchmark: its arithmetic, that it stops at a difference, and small real runs."""

import copy
import json
import sys
from dataclasses import replace
from statistics import median

import pytest
import torch
from rounding import approx
from tiny_models import qwen2

from megatron_prepo.models.flops import FlopCount
from megatron_prepo.models.shape import Shape
from tools.bench import train, train_case, utilisation
from tools.bench.train_case import Case, Group

TASKS = {"score": {"logprob": -0.5}, "update": {"loss": -0.25, "grad_norm": 2.0}}
MEMORY = {"resident_before": 2**20, "resident_peak": 3 * 2**20}


def small_case() -> Case:
    """Return 6 + 7 tokens with an advantage, and 5 + 5 without."""
    groups = [
        Group("a", "1", [5, 6, 7], [[8, 9, 2], [8, 9, 4, 2]], [0.0, 1.0]),
        Group("b", "2", [5, 6], [[8, 9, 2], [9, 9, 2]], [1.0, 1.0]),
    ]
    return Case(train_case.read_config("run.dir=unused"), 4, groups)


def answers(seconds: float) -> dict[str, list[dict]]:
    """Return one trainer's results: a slow first round, and two of this many seconds."""
    return {
        task: [
            {"seconds": {task: spent}, "wall": 2 * spent, **MEMORY, **values}
            for spent in (99.0, seconds, seconds)
        ]
        for task, values in TASKS.items()
    }


def test_a_case_is_read_as_it_was_written(tmp_path):
    case = small_case()
    case.write(tmp_path)
    assert train_case.read(tmp_path) == case
    assert train_case.read(tmp_path, ["loss.clip_low=0.1"]).config.loss.clip_low == 0.1


def test_tokens_count_a_prompt_for_each_of_its_rollouts():
    case = small_case()
    assert case.tokens == 6 + 7 + 5 + 5
    assert case.learnt_share == 13 / 23
    assert [r.tokens for r in case.rollouts(3)][:2] == [(8, 9, 2), (8, 9, 4, 2)]
    assert {r.weight_version for r in case.rollouts(3)} == {3}


def test_rates_leave_the_first_round_out():
    row = train.passes(small_case(), answers(0.5))
    assert row["update"]["tokens_per_second"] == 23 / 0.5
    assert row["memory"] == MEMORY


@pytest.mark.parametrize("value", ["logprob", "loss", "grad_norm"])
def test_a_difference_ends_the_benchmark(value):
    task = "score" if value == "logprob" else "update"
    given = {"ours": answers(1.0), "TRL": copy.deepcopy(answers(1.0))}
    given["TRL"][task][2][value] *= 1 + train.AGREEMENT / 2
    train.check_agreement(given)
    given["TRL"][task][2][value] *= 1 + train.AGREEMENT
    with pytest.raises(SystemExit, match=f"TRL found {value}"):
        train.check_agreement(given)


def test_stages_add_up_to_the_step_and_ppl_is_priced_by_hand():
    seconds = {"perplexity": 1.0, "rollouts": 4.0, "old_logprobs": 2.0, "update": 5.0, "step": 13.0}
    answer = {"seconds": seconds, "wall": 13.0, "completion_tokens": 20, **MEMORY}
    step = train.steps(small_case(), [answer, answer])
    spent = {stage: values[0] for stage, values in step["seconds"].items()}
    assert spent == {"generate": 4.0, "score": 3.0, "update": 5.0, "other": 1.0, "step": 13.0}
    assert step["tokens_per_second"] == (10 + 20) / 13.0
    share = train.perplexity_share(
        step, prompt_tokens=3, response_tokens=12, candidates=5, samples=2
    )
    # scoring 15 tokens per second, learning 6, generating 5: 1 s, and 4.8 + 2 + 5 s
    assert share["share"] == approx(1.0 / (1.0 + 4.8 + 2.0 + 5.0))


@pytest.mark.parametrize(("theirs", "verdict"), [(1.0, "met"), (0.99, "missed")])
def test_goals_are_judged_against_trl_and_without_it_not_at_all(theirs, verdict):
    case = small_case()
    arms = {"ours": train.passes(case, answers(0.5))}
    (row,) = train.goals({"passes": arms})
    assert row["verdict"] == "not measured"
    arms["TRL"] = train.passes(case, answers(theirs))
    (row,) = train.goals({"passes": arms})
    assert (row["verdict"], row["measured"]) == (verdict, theirs / 0.5)


def run(monkeypatch, out, *options: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(out), *options])
    assert train.main() == 0
    return json.loads(out.read_text())["cases"]


def test_a_small_run_without_trl(monkeypatch, tmp_path, capsys):
    out = tmp_path / "result.json"
    options = ["--case", "log-normal", "--prompts", "1", "--rounds", "1"]
    case = run(monkeypatch, out, *options)["log-normal"]
    plain, ours = (case["passes"][name]["loss"] for name in ("plain PyTorch", "ours"))
    assert plain == pytest.approx(ours, rel=train.AGREEMENT)
    assert 0 < case["products"]["update"]["of_peak"] < 1
    assert case["goals"][0]["verdict"] == "not measured"
    assert "| plain PyTorch |" in capsys.readouterr().out


@pytest.mark.slow
def test_whole_steps_and_a_trainer_that_computes_something_else(monkeypatch, tmp_path):
    out = tmp_path / "result.json"
    options = ["--case", "laptop", "--prompts", "2", "--rounds", "2"]
    case = run(monkeypatch, out, *options)["laptop"]
    for step in case["steps"].values():
        seconds = {stage: median(values) for stage, values in step["seconds"].items()}
        assert seconds["generate"] > 0 and seconds["update"] > 0 and seconds["other"] >= 0
    assert 0 < case["perplexity_share"]["share"] < 0.1
    other = train.Arm("other", "ours", ("loss.aggregation=seq-mean-token-sum",))
    monkeypatch.setattr(train, "available", lambda _: [train.Arm("ours", "ours"), other])
    with pytest.raises(SystemExit, match="other found loss"):
        run(monkeypatch, out, *options)


def measure_utilisation(monkeypatch, tmp_path, *words):
    qwen2().config.save_pretrained(tmp_path / "tiny")
    out = tmp_path / "result.json"
    argv = ["--model", str(tmp_path / "tiny"), "--sequences", "3", "--response-tokens", "20"]
    monkeypatch.setattr(sys, "argv", ["utilisation.py", "--out", str(out), *argv, *words])
    assert utilisation.main() == 0
    return json.loads(out.read_text())


def test_utilisation_of_a_tiny_model(monkeypatch, tmp_path, capsys):
    """Utilisation is measured as on a GPU, except for the peak: operations are the formula's over
    the seconds measured."""
    result = measure_utilisation(monkeypatch, tmp_path, "--arms", "packed,fused norm")
    (case,) = result["cases"]
    hf = json.loads((tmp_path / "tiny" / "config.json").read_text())
    work = FlopCount.of(utilisation.rollouts(3, 20, hf["vocab_size"]))
    assert (case["layers"], case["tokens"]) == (4, work.tokens)
    assert case["arms"].keys() == {"packed", "fused norm"}
    for arm in case["arms"].values():
        spent = median(arm["seconds"]["update"])
        assert arm["update"]["tflops"] == 3 * work.flops(Shape.of(hf)) / spent / 1e12
        assert arm["update"]["mfu"] is None
    assert result["goals"][0]["verdict"] == "not measured"
    assert "4 of 4 layers" in capsys.readouterr().out


def test_an_arm_without_memory_or_time_ends_no_other(monkeypatch, tmp_path, capsys):
    def no_memory(actor, sequences):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(utilisation, "passes", no_memory)
    result = measure_utilisation(monkeypatch, tmp_path, "--arms", "packed,padded")
    reason = {"failed": "CUDA out of memory. Tried to allocate 2 GiB"}
    assert result["cases"][0]["arms"] == {"packed": reason, "padded": reason}
    assert result["goals"][0]["verdict"] == "not measured"
    assert "| padded | failed: CUDA out of memory." in capsys.readouterr().out
    (tmp_path / "result.json").unlink()
    result = measure_utilisation(monkeypatch, tmp_path, "--seconds", "-1")
    assert result["not_started"] == [f"tiny, {name}" for name in utilisation.ARMS]


def test_layers_that_fit_are_counted_by_bytes(monkeypatch):
    """7B on 80 GiB: of the 77.3e9 bytes that may be used, embeddings take 18 x 1.09e9, the head
    1.1e9, and each layer 18 x 2.33e8 for parameters and 2.47e9 for activations of 8,192 tokens."""
    hf = json.loads((utilisation.MODELS[0] / "config.json").read_text())
    gpu = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    shape, config = Shape.of(hf), utilisation._config("unused", 4500, {})
    assert utilisation.layers_that_fit(shape, config) == 8
    assert utilisation.layers_that_fit(replace(shape, layers=4), config) == 4
    gpu.total_memory = 143771 * 2**20  # an H200, where 20 layers were chosen, and need 154e9 bytes
    assert utilisation.layers_that_fit(shape, config) == 17
