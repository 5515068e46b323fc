"""An exported model describes itself: whoever loads it gets every number that was written."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from megatron_prepo import config as configuration
from megatron_prepo.errors import UserError
from megatron_prepo.evaluation import suites
from megatron_prepo.models.hf_files import HFWriter, carry_over, other_files, widest

CONFIGS = {
    # keys for the type in the base's config.json
    "dtype": {"dtype": "bfloat16"},
    "torch_dtype": {"torch_dtype": "bfloat16"},
    "both": {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
    "both, and not the same": {"dtype": "float16", "torch_dtype": "bfloat16"},
    "null beside the old key": {"dtype": None, "torch_dtype": "float16"},
    "float16": {"dtype": "float16"},
    "nothing": {},
    "a stale quantisation": {
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
}


def base(directory, model, described):
    """Create a base model in bfloat16, whose config.json has these keys about its type."""
    model.to(torch.bfloat16).save_pretrained(directory)
    path = directory / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "dtype"}
    path.write_text(json.dumps(config | described))
    return directory


def export(weights, like, out):
    """Export as at the end of a run."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    writer = HFWriter(out, shapes, like=like)
    for name, tensor in weights.items():
        writer.write(name, tensor)
    writer.finish()


@pytest.mark.parametrize("name", CONFIGS)
def test_no_number_that_training_moved_is_rounded_away_by_who_loads_it(tmp_path, name):
    """The base is in bfloat16, trained in float32 by less than bfloat16 can represent."""
    model = tiny_models.qwen3(tied=False)
    hf = base(tmp_path / "base", model, CONFIGS[name])
    before = {n: p.detach().float() for n, p in model.named_parameters()}
    after = {n: p * (1 + 2**-12) + 2**-20 for n, p in before.items()}
    export(after, hf, tmp_path / "out")
    for n, found in loaded(tmp_path / "out").items():
        moved = after[n] != before[n]
        assert moved.any() and torch.equal(found, after[n]), n
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {"float32"}
    assert (CONFIGS[name].keys() & {"dtype", "torch_dtype"}) <= config.keys()
    assert "quantization_config" not in config


def loaded(directory):
    """Return the model that transformers loads from a directory, as `evaluate` does."""
    theirs = dict(AutoModelForCausalLM.from_pretrained(directory).named_parameters())
    settings = suites.load_settings(None, [("model", str(directory))], ["rollout.max_new_tokens=4"])
    assert settings.model.dtype == "float32"
    tree = configuration.overridden(suites.PLACEHOLDERS, ["rollout.max_new_tokens=4"])
    assert tree.model.dtype == "bfloat16", "the default, which would round"
    settings = configuration.overridden(
        suites.PLACEHOLDERS,
        ["rollout.max_new_tokens=4", "model.dtype=float32", f"model.hf={directory}"],
    )
    tokenizer = SimpleNamespace(eos_token_id=0)
    ours = dict(suites.engine_with_files(settings, tokenizer).model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype is ours[name].dtype is torch.float32
        assert torch.equal(tensor, ours[name]), name
    return ours


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_megatron_checkpoint_is_evaluated_in_the_type_of_its_weights(
    tmp_path, monkeypatch, dtype
):
    """Whatever the type of an optimizer's state in it, and that of another model's files."""
    from checkpoints_convert.convert import import_hf
    from megatron_prepo.models.torch_dist import TorchDistReader

    model = tiny_models.qwen3(tied=True)
    hf = base(tmp_path / "base", model, {"torch_dtype": "bfloat16"})
    import_hf(hf, tmp_path / "megatron", dtype=dtype)
    read = TorchDistReader.__init__

    def with_optimizer(reader, directory):
        read(reader, directory)
        single = SimpleNamespace(properties=SimpleNamespace(dtype=torch.float32))
        for prefix in ("optimizer.state.", "chained_0.optimizer.state."):
            reader.tensors |= {prefix + name: single for name in list(reader.tensors)}

    monkeypatch.setattr(TorchDistReader, "__init__", with_optimizer)
    named = [("model", str(tmp_path / "megatron"))]
    words = ["rollout.max_new_tokens=4"]
    assert suites.load_settings(None, named, words).model.dtype == dtype
    named.append(("base", str(hf)))
    assert suites.load_settings(None, named, words).model.dtype == dtype
    given = [*words, "model.dtype=bfloat16"]
    assert suites.load_settings(None, named, given).model.dtype == "bfloat16"


def test_experts_are_loaded_for_evaluation(tmp_path):
    """Transformers has two tensors for the experts in memory, and one per expert in files."""
    model = tiny_models.qwen3_moe()
    tiny_models.save(model, tmp_path)
    expected = dict(model.named_parameters())
    for name, found in loaded(tmp_path).items():
        assert torch.equal(found, expected[name]), name


def test_norms_in_float32_make_the_model_float32(tmp_path):
    """Norms in float32 would be rounded otherwise; what is bfloat16 already loses nothing."""
    hf = base(tmp_path / "base", tiny_models.qwen3(tied=True), {"torch_dtype": "bfloat16"})
    weights = dict(AutoModelForCausalLM.from_pretrained(hf).named_parameters())
    weights = {n: p.detach() + (2**-12 if "norm" in n else 0) for n, p in weights.items()}
    weights = {n: p.float() if "norm" in n else p.bfloat16() for n, p in weights.items()}
    export(weights, hf, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype is torch.float32
    assert all(torch.equal(p, weights[n].float()) for n, p in theirs.named_parameters())


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16], torch.bfloat16),
        ([torch.float16], torch.float16),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
    ],
)
def test_the_widest_type_holds_all_numbers(dtypes, expected):
    assert widest(dtypes) is expected


def test_a_description_that_is_right_is_left_to_the_byte(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    text = '{"torch_dtype":   "bfloat16",\n "model_type": "llama"}'
    (tmp_path / "source" / "config.json").write_text(text)
    carry_over(tmp_path / "source", tmp_path / "target", dtype=torch.bfloat16)
    assert (tmp_path / "target" / "config.json").read_text() == text


def test_the_parts_of_a_model_are_described_too(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    config = {"torch_dtype": "float16", "text_config": {"dtype": "float16"}, "vision_config": {}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    carry_over(tmp_path / "source", tmp_path / "target", dtype=torch.float32)
    assert json.loads((tmp_path / "target" / "config.json").read_text()) == {
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32"},
        "vision_config": {},
    }


# Other files

KEPT = (
    *("config.json", "generation_config.json", "tokenizer.json", "README.md", "LICENSE"),
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "modeling_custom.py"),
    *("assets/pictures/logo.png", "params.json", "vocab.json"),
)
LEFT = (
    *("model.safetensors", "model.safetensors.index.json", "model.safetensors.index.fp16.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "a.gguf"),
    *("consolidated.safetensors", "training_args.bin", "optimizer.pt", "tf_model.h5"),
    *("consolidated/params.json", "original/params.json", "original/consolidated.00.pth"),
    *("onnx/config.json", "onnx/model.onnx", ".cache/huggingface/lock", ".git/HEAD"),
    *("checkpoint-500/config.json", "checkpoints/iter_0000001/run.json", "iter_0000002/run.json"),
    *("run/config.yaml", "run/hf/config.json", "other/config.json", "other/model.safetensors"),
    *("megatron/latest_checkpointed_iteration.txt", "megatron/hf/config.json"),
    *("stopped.partial/hf/config.json", "assets/extra.safetensors"),
)


def fill(directory):
    for name in (*KEPT, *LEFT):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")
    return directory


def read_files(directory):
    return {str(p.relative_to(directory)) for p in Path(directory).rglob("*") if p.is_file()}


def test_all_files_and_folders_of_the_source_are_carried_but_weights_of_any_format(tmp_path):
    source = fill(tmp_path / "source")
    carry_over(source, tmp_path / "target")
    assert read_files(tmp_path / "target") == set(KEPT)


def test_links_of_a_cache_are_carried_as_what_they_lead_to(tmp_path):
    """`huggingface_hub` keeps a snapshot's files, and optionally directories, as links to blobs."""
    blobs, snapshot = fill(tmp_path / "blobs"), tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        os.symlink(os.path.relpath(path, snapshot), snapshot / path.name)
    carry_over(snapshot, tmp_path / "target")
    assert read_files(tmp_path / "target") == set(KEPT)
    assert not any(path.is_symlink() for path in (tmp_path / "target").rglob("*"))


def test_a_link_in_a_circle_ends(tmp_path):
    source = fill(tmp_path / "source")
    os.symlink(source, source / "assets" / "again")
    assert set(map(str, other_files(source))) == set(KEPT)


def test_a_link_to_nothing_is_named(tmp_path):
    source = fill(tmp_path / "source")
    os.symlink("absent", source / "merges.txt")
    with pytest.raises(UserError, match=r"merges.txt is a link to absent, which is missing"):
        other_files(source)


@pytest.mark.parametrize("below", ["out", "deeper/out"])
def test_an_export_below_its_source_does_not_carry_itself(tmp_path, below):
    source = fill(tmp_path / "source")
    out = source / below
    for _ in range(2):
        export({"lm_head.weight": torch.zeros(2, 2)}, source, out)
        assert read_files(out) == {*KEPT, "model.safetensors"}
