"""Rates by hand, peaks, and a trace that has the stages' names."""

import gzip
import json

import pytest
import torch
from rounding import approx
from tiny_models import SHAPE, actor_config

from megatron_prepo.actor import parallel
from megatron_prepo.config import ProfileConfig
from megatron_prepo.models.flops import FlopCount
from megatron_prepo.plan.gpus import DEVICE_NAMES, GPUS, peak_flops
from megatron_prepo.records import Prompt, ScoredSequence
from megatron_prepo.run.profiling import profiled
from megatron_prepo.run.stopwatch import Stopwatch
from megatron_prepo.selection.base import Candidates
from megatron_prepo.trainer import throughput
from megatron_prepo.trainer.throughput import Throughput

HF = SHAPE | {"model_type": "qwen2"}
PROMPTS = [Prompt(name, "", "", (5, 6, 7), (0, 3)) for name in "ab"]
SEQUENCES = [ScoredSequence((5, 6, 7, *range(n)), 3) for n in (1, 2, 3, 4)]
LEARNT = [True, True, False, False]


@pytest.fixture(autouse=True)
def one_rank():
    parallel.initialize(actor_config("unused").parallel, seed=0)
    yield
    parallel.shut_down()


def spent(**seconds: float) -> Stopwatch:
    watch = Stopwatch()
    watch.total.update(perplexity=8.0, old_logprobs=8.0, update=8.0)
    watch.of_step()  # an earlier step's seconds do not count
    for stage, value in seconds.items():
        watch.total[stage] += value
    return watch


def throughput_of(**settings) -> Throughput:
    return Throughput(HF, **{"dtype": "float32", "by_actor": True, "scorings": 1} | settings)


def measured(*, ppl_P=None, learnt=LEARNT, **settings) -> dict[str, float]:
    watch = spent(perplexity=0.5, old_logprobs=2.0, update=4.0)
    rates = throughput_of(**settings)
    rates.scored.append(Candidates(PROMPTS, ppl_P))
    return rates.of_step(watch, SEQUENCES, learnt)


def test_tokens_a_second_by_hand():
    rates = measured(ppl_P=torch.ones(2))
    assert rates["speed/perplexity_tokens"] == 6 / 0.5
    assert rates["speed/old_logprobs_tokens"] == (4 + 5 + 6 + 7) / 2.0
    assert rates["speed/update_tokens"] == (4 + 5) / 4.0  # the second group has no advantage


def test_all_candidates_scored_in_a_step_count_once():
    """The overlapped loop scores two steps' candidates in its first step."""
    rates_of, watch = throughput_of(), spent(perplexity=0.5, update=4.0)
    rates_of.scored += [Candidates(PROMPTS, torch.ones(2))] * 2
    rates = rates_of.of_step(watch, SEQUENCES, [True, False, True, False])
    assert rates["speed/perplexity_tokens"] == 12 / 0.5
    assert rates["speed/update_tokens"] == (4 + 6) / 4.0
    again = rates_of.of_step(watch, SEQUENCES, LEARNT)
    assert "speed/perplexity_tokens" not in again, "each candidate counts in one step"


def test_operations_a_second_by_hand():
    rates = throughput_of()
    old, update = FlopCount(22, 10, 10 + 15 + 21 + 28), FlopCount(9, 3, 10 + 15)
    assert measured()["speed/old_logprobs_tflops"] == old.flops(rates.shape) / 2e12
    assert measured()["speed/update_tflops"] == 3 * update.flops(rates.shape) / 4e12


def test_pairs_outside_of_a_sliding_window_are_no_operations():
    rates = Throughput(
        HF | {"model_type": "mistral", "sliding_window": 3},
        dtype="float32",
        by_actor=True,
        scorings=1,
    )
    found = rates.of_step(spent(update=4.0), SEQUENCES, LEARNT)
    update = FlopCount(9, 3, (1 + 2 + 3 + 3) + (1 + 2 + 3 + 3 + 3))
    assert found["speed/update_tflops"] == 3 * update.flops(rates.shape) / 4e12


def test_the_initial_policys_scores_are_a_second_pass():
    rates = measured(scorings=2, learnt=[True] * 4)
    assert rates["speed/update_tokens"] == 22 / 4.0
    assert rates["speed/old_logprobs_tokens"] == 44 / 2.0


def test_candidates_that_the_engine_scores_are_no_pass_of_the_actor():
    assert "speed/perplexity_tokens" not in measured(ppl_P=torch.ones(2), by_actor=False)


def test_what_was_not_done_has_no_rate():
    rates = measured()
    assert not [name for name in rates if "perplexity" in name]
    nothing = measured(learnt=[False] * 4)
    assert "speed/old_logprobs_tokens" in nothing
    assert "speed/update_tokens" not in nothing


def test_utilisation_is_of_the_devices_peak(monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda device, dtype: 1e9)
    rates = measured()
    assert rates["speed/update_mfu"] == approx(rates["speed/update_tflops"] * 1e3)
    monkeypatch.undo()
    assert "speed/update_mfu" not in measured(), "a CPU has no published peak"


def test_every_gpu_is_known_by_its_name_in_bfloat16_only():
    assert set(DEVICE_NAMES.values()) == set(GPUS)
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == GPUS["h100"].flops
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None


def test_a_trace_has_the_stages(tmp_path):
    config, watch = ProfileConfig(steps=(1,)), Stopwatch()
    for step in range(3):
        for rank in range(2):
            with profiled(config, step, rank, tmp_path), watch("old_logprobs"):
                torch.ones(2, 2) @ torch.ones(2, 2)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "step_1_rank_0.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    named = {event["name"]: event for event in events if "dur" in event}
    stage, product = named["old_logprobs"], named["aten::mm"]
    assert stage["ts"] <= product["ts"]
    assert product["ts"] + product["dur"] <= stage["ts"] + stage["dur"]
