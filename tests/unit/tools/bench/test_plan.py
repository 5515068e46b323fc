"""The measurements of a plan, on a CPU: as on a GPU, except for peaks and the counter of bytes."""

import json
import sys

import pytest
import torch
from tiny_models import qwen2

from tools.bench import plan
from tools.bench.plan import most_bytes


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Result for a small model, with and without recomputation."""
    folder = tmp_path_factory.mktemp("plan")
    qwen2().config.save_pretrained(folder / "tiny")
    out = folder / "result.json"
    words = ["--model", str(folder / "tiny"), "--length", "64", "--sequences", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plan.py", "--out", str(out), *words, "--copy-mib", "1"])
        assert plan.main() == 0
    return json.loads(out.read_text())


def test_a_plans_memory_is_what_an_actor_takes(result):
    kept, recomputed = result["memory"]
    assert (kept["layers"], kept["tokens"]) == (4, 256)
    # a CPU multiplies a float32 copy of the logits' gradient, a GPU the bfloat16 one in their place
    copied = 4 * kept["tokens"] * qwen2().config.vocab_size
    assert abs((kept["planned"] + copied) / kept["peak"] - 1) < plan.WITHIN, kept
    # with recomputation a plan adds the head to a layer's activations, which do not exist at the
    # same time
    assert recomputed["planned"] - recomputed["planned_parts"]["head"] < recomputed["peak"]
    assert recomputed["planned"] > 0.9 * recomputed["peak"]
    assert recomputed["peak"] < kept["peak"]
    assert result["goal"]["verdict"] == "not measured"  # only a GPU can measure it


def test_rates_are_operations_and_bytes_over_seconds(result, monkeypatch):
    assert [row["product"] for row in result["products"]][-1] == "head"
    assert all(row["flops"] > 0 and row["of_peak"] is None for row in result["products"])
    monkeypatch.setattr(plan, "seconds", lambda work: work() is None or 2.0)
    assert plan.copies(1000) == {"memory": 1000.0, "memory_of_peak": None}


def test_the_goal_is_judged_by_the_worst_plan(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cases = [{"planned_over_measured": ratio} for ratio in (1.02, 0.93)]
    assert plan.goal(cases)["verdict"] == "met"
    assert plan.goal([*cases, {"planned_over_measured": 1.11}])["verdict"] == "missed"
    assert plan.goal([])["verdict"] == "not measured"


def test_the_most_bytes_are_those_alive_at_once():
    kept = torch.zeros(1000)
    with most_bytes() as most:
        first = torch.zeros(250)  # 1,000 bytes
        second = first + 1
        del second
        third = torch.zeros(100)
        kept.add_(third[0])
    assert most.bytes == pytest.approx(2000, abs=64)  # one or two additional scalars
