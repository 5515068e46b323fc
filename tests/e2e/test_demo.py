"""The demo at a reduced size: it converts, learns and exports, and `transformers` agrees."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_prepo.cli import main
from megatron_prepo.demo import reward_words
from tests.e2e.laptop import LAPTOP, summary


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", "--dir", str(directory), "train.total_steps=16", "eval.every=0"]) == 0
    return directory


def test_it_learns(demo):
    """The gain is exactly 0 with a zero learning rate, and the pass rate 0 with random weights."""
    result = summary(demo)
    assert result["held_out_prompts"] >= 200
    assert result["pass_rate_before"] == pytest.approx(0.42, abs=0.05)
    assert result["gain_ci95"][0] > 0.03
    assert result["pass_rate_after_ci95"][0] > result["pass_rate_before"]


def test_transformers_reaches_the_same_pass_rate(demo):
    """Two samples of 1600 answers: their difference has a standard error below 0.015."""
    result = summary(demo)
    assert result["pass_rate_transformers"] == pytest.approx(result["pass_rate_after"], abs=0.05)


def test_the_export_is_the_trained_model_and_not_the_base(demo):
    base, trained = (load_file(d / "model.safetensors") for d in (LAPTOP / "base", demo / "hf"))
    assert base.keys() == trained.keys()
    assert all(base[name].shape == trained[name].shape for name in base)
    assert not any(torch.equal(base[name], trained[name]) for name in base)


def test_base_checkpoint_is_whole(demo):
    tracker = demo / "base_megatron" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "release"
    metadata = json.loads((demo / "base_megatron" / "release" / "metadata.json").read_text())
    assert metadata["sharded_backend"] == "torch_dist"


def test_a_training_reward_that_falls_is_explained():
    steps = [
        {"selection/window_first": i, "reward/mean": 0.9 - i / 50, "ppl/selected/mean": 1 + i / 10}
        for i in range(20)
    ]
    words = reward_words(steps)
    assert "training reward:    0.890 in the first steps, 0.530 in the last" in words
    assert "to harder prompts, from mean perplexity 1.05 to 2.85" in words
    assert reward_words(steps[::-1]) == "", "it rises"
    assert reward_words([{"reward/mean": 0.5}, {"reward/mean": 0.4}]) == "", "there is no window"
