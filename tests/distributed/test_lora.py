"""Adapters that were trained under tensor parallelism, exported in three ways that agree.

The run's merged export, its checkpoint converted, and its adapters loaded by `peft` onto the base.
"""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from ranks import join, on_ranks
from rounding import allowance, bound, largest_difference
from safetensors.torch import load_file
from tiny_models import VOCAB, actor_config
from transformers_scores import model_of

from checkpoints_convert.convert import export_hf
from checkpoints_convert.verify import verify
from megatron_prepo.actor.checkpoint import load_weights
from megatron_prepo.config import ModelConfig
from megatron_prepo.errors import UserError
from megatron_prepo.inputs.preflight import check_weights
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.hf_files import HFTensors
from megatron_prepo.records import ScoredSequence

LORA = {"rank": 3, "alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}


def trained(hf, scratch):
    """Make two updates, write all exports, and return the scores of a sequence."""
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.actor import Actor, TrainingSequence

    config = actor_config(
        hf,
        lora=LORA,
        parallel={"tensor": 2},
        optimizer={"lr": 3e-2},
        data={"max_prompt_tokens": 16},
    )
    join(2)
    parallel.initialize(config.parallel, seed=1)
    actor = Actor(config)
    generator = torch.Generator().manual_seed(3)
    batch = [
        TrainingSequence(
            ScoredSequence(tuple(torch.randint(0, VOCAB, (12,), generator=generator).tolist()), 3),
            old_logprobs_T=torch.full((9,), -5.0),
            advantage=(-1.0) ** i,
            coefficient=0.5,
        )
        for i in range(4)
    ]
    for _ in range(2):
        actor.update(batch)
    actor.save(f"{scratch}/checkpoints", step=1)
    write = torch.distributed.get_rank() == 0
    actor.export(f"{scratch}/hf", write=write)
    actor.export_adapter(f"{scratch}/adapter", base=hf, write=write)
    parallel.shut_down()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the directories of the base and of the run's exports."""
    hf = tiny_models.save(tiny_models.qwen2(), tmp_path_factory.mktemp("hf"))
    scratch = tmp_path_factory.mktemp("run")
    on_ranks(2, trained, hf, str(scratch))
    return Path(hf), scratch


def tensors_of(directory):
    with HFTensors(directory, tied=True) as tensors:
        return {name: tensors[name] for name in tensors.names()}


def written_out(hf, run):
    """Return W + (alpha / r) B A of the files, in float64."""
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    merged = {name: tensor.double() for name, tensor in tensors_of(hf).items()}
    for name in [name for name in adapter if ".lora_A." in name]:
        product = adapter[name.replace("lora_A", "lora_B")].double() @ adapter[name].double()
        merged[name.removeprefix("base_model.model.").replace(".lora_A", "")] += 2 * product
    return merged


def test_the_merged_export_is_the_formula(run):
    """Each number is a sum of 4 products of up to 2 in size, rounded to float32."""
    exact, base = written_out(*run), tensors_of(run[0])
    for name, tensor in tensors_of(run[1] / "hf").items():
        adapted = name.split(".")[-2] in LORA["target_modules"] and name.endswith("weight")
        assert torch.equal(tensor, base[name]) != adapted, name
        allowed = bound(8, torch.float32) * exact[name].abs().max().item()
        assert largest_difference(tensor.double(), exact[name]) <= allowed, name


def test_a_converted_checkpoint_is_the_merged_export(run, tmp_path):
    hf, scratch = run
    export_hf(scratch / "checkpoints", tmp_path / "converted", hf=hf)
    exact, converted = written_out(hf, scratch), tensors_of(tmp_path / "converted")
    assert converted.keys() == exact.keys()
    for name, tensor in converted.items():
        allowed = bound(8, torch.float32) * exact[name].abs().max().item()
        assert largest_difference(tensor.double(), exact[name]) <= allowed, name


def test_a_checkpoint_with_adapters_is_not_verified(run):
    hf, scratch = run
    with pytest.raises(UserError, match=r"^--megatron .* has adapters .*--hf DIR"):
        verify(hf, megatron=scratch / "checkpoints", quick=True)


def test_the_adapter_has_the_form_of_peft(run):
    settings = json.loads((run[1] / "adapter" / "adapter_config.json").read_text())
    adapter = load_file(run[1] / "adapter" / "adapter_model.safetensors")
    assert settings["target_modules"] == LORA["target_modules"]
    assert len(adapter) == 4 * 4 * 2
    name = "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight"
    assert adapter[name].shape == (3, 32) and adapter[name].dtype == torch.float32


def test_peft_computes_the_logits_of_the_merged_export(run):
    """In float64, where `peft` computes with the adapters next to the weights.

    The merged weights are rounded to float32, as in a model of that type.
    """
    peft = pytest.importorskip("peft", reason="`make test` does not install peft")
    hf, scratch = run
    tokens_1S = torch.arange(40)[None]
    model = peft.PeftModel.from_pretrained(model_of(str(hf)), str(scratch / "adapter")).double()
    with torch.no_grad():
        theirs, ours, base = (
            m(tokens_1S).logits for m in (model, model_of(str(scratch / "hf")), model_of(str(hf)))
        )
        rounded = model_of(str(scratch / "hf"), torch.float32)(tokens_1S).logits.double()
    allowed = allowance(largest_difference(rounded, ours), ours.abs().mean().item())
    assert largest_difference(ours, theirs) <= allowed
    assert largest_difference(ours, base) > 1000 * allowed


def test_a_checkpoint_with_adapters_starts_no_other_run(run):
    hf, scratch = run
    model = ModelConfig(hf=str(hf), megatron=str(scratch / "checkpoints"))
    with pytest.raises(UserError, match=r"has adapters .*checkpoints_convert export"):
        check_weights(model, read_hf_config(hf))
    with pytest.raises(UserError, match="has adapters"):
        load_weights([], scratch / "checkpoints", read_hf_config(hf))
