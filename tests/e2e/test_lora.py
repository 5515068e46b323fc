"""A run with adapters: the engine in sync at every step, resumed, exported; the base unchanged."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.laptop import LAPTOP, SHORT, metrics, train

ADAPTERS = [
    *("lora.rank=4", "loss.kl_coef=0.01", "parallel.tensor=2", "weight_sync.verify=always"),
    *("eval.samples_during=1", "checkpoint.every=1"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run of two steps that was stopped after the first, and its base."""
    base = tmp_path_factory.mktemp("model") / "base"
    shutil.copytree(LAPTOP / "base", base)
    run = tmp_path_factory.mktemp("run") / "run"
    settings = [*SHORT, *ADAPTERS, f"model.hf={os.path.relpath(base)}"]
    assert train(run, *settings, "train.total_steps=1") == 0
    assert train(run, *settings, "train.total_steps=2") == 0
    return run, base


@pytest.mark.slow
def test_a_run_resumes_and_exports_the_model_and_the_adapters(run):
    directory, base = run
    steps = metrics(directory)
    assert len(steps) == 2 and all(step["loss/grad_norm"] > 0 for step in steps)
    assert steps[1]["loss/kl_to_reference"] > 0
    adapter = load_file(directory / "adapter" / "adapter_model.safetensors")
    settings = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["base_model_name_or_path"] == str(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(d / "model.safetensors")[name] for d in (base, directory / "hf"))
    assert not torch.equal(before, after)
    assert any(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)


@pytest.mark.slow
def test_a_changed_base_is_refused(run, capfd):
    directory, base = run
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, base / "model.safetensors")
    settings = [*SHORT, *ADAPTERS, f"model.hf={base}", "train.total_steps=3"]
    assert train(directory, *settings) == 2
    assert "is not what the run began with in model.safetensors" in capfd.readouterr().err
