"""A model directory means the same to us as to `transformers`: config.json and tensor names.

Either a directory is refused in one line, or the logits are those that `transformers` computes with
it, up to a multiple of the rounding of `transformers` itself.
"""

import copy
import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_prepo.actor import tiny_instance
from megatron_prepo.errors import UserError
from megatron_prepo.models.fit import check_fit, expected_shapes
from megatron_prepo.models.float64 import computing_in_float64
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.hf_files import EMBEDDING, HEAD, INDEX, SINGLE, HFTensors

MODELS = {
    "qwen2": lambda: tiny_models.qwen2(tied=False),
    "qwen3": lambda: tiny_models.qwen3(tied=False),
    "tied": lambda: tiny_models.qwen3(tied=True),
    "llama": lambda: tiny_models.llama3(),
    "mistral": lambda: tiny_models.mistral(window=6),
    "moe": lambda: tiny_models.qwen3_moe(),
}
FACTOR = 8
"""Ours may differ by this many times what transformers in float32 differs by from float64."""
LLAMA3 = {k: v for k, v in tiny_models.LLAMA3_ROPE.items() if k != "rope_theta"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories; not to be changed."""
    root = tmp_path_factory.mktemp("hf")
    return {name: Path(tiny_models.save(make(), root / name)) for name, make in MODELS.items()}


@pytest.fixture
def folder(models, tmp_path):
    """Copy a model's directory, with keys of config.json changed, and removed where None."""

    def make(name, changes=None, absent=()):
        target = Path(shutil.copytree(models[name], tmp_path / "model", dirs_exist_ok=True))
        change_config(target, changes or {}, absent)
        return target

    return make


def change_config(directory, changes, absent=()):
    config = json.loads((directory / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in absent}
    (directory / "config.json").write_text(json.dumps(config | changes))


def change_tensors(directory, change):
    weights = load_file(directory / SINGLE)
    weights = {name: tensor.contiguous() for name, tensor in change(weights).items()}
    save_file(weights, directory / SINGLE, metadata={"format": "pt"})


def assert_same_logits(directory):
    """Assert that our logits and those of `transformers` agree, at positions far apart.

    UserError if the folder is refused.
    """
    hf = read_hf_config(directory)
    with HFTensors(directory, tied=hf["tie_word_embeddings"]) as tensors:
        check_fit(tensors, hf)
    tokens_1S = torch.arange(48)[None] * 5 % hf["vocab_size"]
    last = min(hf["max_position_embeddings"], 4096) - 1
    positions_1S = torch.linspace(0, last, 48).long()[None]
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    theirs.set_experts_implementation("eager")
    arguments = tokens_1S, positions_1S
    theirs_SV = tiny_instance.transformers_logits(theirs, *arguments)
    with computing_in_float64(theirs):
        exact_SV = tiny_instance.transformers_logits(theirs, *arguments)
    ours_SV = tiny_instance.megatron_logits(directory, hf, *arguments)
    rounding = (theirs_SV - exact_SV).abs().max()
    assert (ours_SV - theirs_SV).abs().max() <= FACTOR * rounding
    assert 0 < rounding < 1e-3 * theirs_SV.std()
    return theirs_SV


def assert_refused(directory, *said):
    with pytest.raises(UserError) as caught:
        assert_same_logits(directory)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000
    for part in said:
        assert part in message, message


# config.json

SAME = {
    # name: (model, changes, absent keys)
    "as it is": ("llama", {}, ()),
    "rope_scaling beside rope_parameters": (
        "llama",
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        (),
    ),
    "rope_parameters beside a default rope_scaling": (
        "llama",
        {"rope_scaling": {"rope_type": "default"}},
        (),
    ),
    "rope_scaling of transformers 4": (
        "llama",
        {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
        ("rope_parameters",),
    ),
    "type, not rope_type": (
        "llama",
        {"rope_scaling": {"type": "llama3"} | {k: v for k, v in LLAMA3.items() if k[:4] != "rope"}},
        ("rope_parameters",),
    ),
    "original_max_position_embeddings at the top": (
        "llama",
        {
            "original_max_position_embeddings": 8192,
            "rope_parameters": tiny_models.LLAMA3_ROPE | {"original_max_position_embeddings": 4096},
        },
        (),
    ),
    "theta at the top and in rope_parameters": ("qwen3", {"rope_theta": 1e6}, ()),
    "theta at the top": ("qwen3", {"rope_theta": 1e6}, ("rope_parameters",)),
    "no theta": ("qwen3", {}, ("rope_parameters",)),
    "an integer theta": ("qwen3", {"rope_theta": 1000000}, ("rope_parameters",)),
    "no rms_norm_eps": ("qwen3", {}, ("rms_norm_eps",)),
    "another rms_norm_eps": ("qwen3", {"rms_norm_eps": 0.01}, ()),
    "no max_position_embeddings": ("qwen3", {}, ("max_position_embeddings",)),
    "no head_dim": ("llama", {}, ("head_dim",)),
    "head_dim of null": ("llama", {"head_dim": None}, ()),
    "no tie_word_embeddings": ("qwen3", {}, ("tie_word_embeddings",)),
    "a sliding window that is not used": ("qwen3", {"sliding_window": 4}, ()),
    "no layer_types": ("qwen3", {}, ("layer_types",)),
    "a sliding window": ("mistral", {}, ()),
    "a sliding window of one token": ("mistral", {"sliding_window": 1}, ()),
    "no sliding window": ("mistral", {"sliding_window": None}, ()),
    "the sliding window of 4,096 by default": ("mistral", {}, ("sliding_window",)),
    "a key that Mistral has not": ("mistral", {"use_sliding_window": False}, ()),
    "Mistral's heads by default": (
        "mistral",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 32, "head_dim": 8},
        (),
    ),
    "num_local_experts": ("moe", {"num_local_experts": 8}, ("num_experts",)),
    "norm_topk_prob false": ("moe", {"norm_topk_prob": False}, ()),
    "no norm_topk_prob": ("moe", {}, ("norm_topk_prob",)),
    "one expert a token": ("moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}, ()),
    "keys of training tools": ("qwen3", {"unsloth_version": "1", "use_cache": False}, ()),
    "settings of a generation": ("qwen3", {"temperature": 0.6, "top_k": 1, "do_sample": True}, ()),
    "attention_bias of Qwen2, which always has it": ("qwen2", {"attention_bias": False}, ()),
}


@pytest.mark.parametrize("name", SAME)
def test_a_config_json_means_what_transformers_computes(folder, name):
    model, changes, absent = SAME[name]
    assert_same_logits(folder(model, changes, absent))


REFUSED = {
    # name: (model, changes, absent keys, the error message)
    "norm_topk_prob of null": ("moe", {"norm_topk_prob": None}, (), ["norm_topk_prob"]),
    "norm_topk_prob that is a text": ("moe", {"norm_topk_prob": "no"}, (), ["norm_topk_prob"]),
    "num_local_experts beside num_experts": ("moe", {"num_local_experts": 4}, (), ["mlp.gate"]),
    "no num_experts_per_tok": ("moe", {}, ("num_experts_per_tok",), ["lacks num_experts_per_tok"]),
    "no moe_intermediate_size": (
        "moe",
        {},
        ("moe_intermediate_size",),
        ["lacks moe_intermediate_size"],
    ),
    "more experts a token than experts": ("moe", {"num_experts_per_tok": 9}, (), ["=9", "=8"]),
    "dense layers": ("moe", {"mlp_only_layers": [1]}, (), ["mlp_only_layers=[1]"]),
    "every second layer": ("moe", {"decoder_sparse_step": 2}, (), ["decoder_sparse_step=2"]),
    "other sizes of heads by default": ("qwen3", {}, ("head_dim",), ["(512, 32)"]),
    "other key-value heads by default": ("qwen2", {}, ("num_key_value_heads",), ["heads=32"]),
    "groups that do not divide": ("qwen3", {"num_key_value_heads": 3}, (), ["num_key_value_heads"]),
    "sliding layers": (
        "qwen3",
        {"layer_types": ["sliding_attention"] * 4},
        (),
        ["layer_types"],
    ),
    "a sliding window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        ("layer_types",),
        ["sliding_window=4"],
    ),
    "a sliding window of no token": ("mistral", {"sliding_window": 0}, (), ["sliding_window=0"]),
    "a sliding window that is a text": ("mistral", {"sliding_window": "6"}, (), ["sliding_window"]),
    "Mistral's heads without head_dim": ("mistral", {"head_dim": None}, (), ["(48, 32)"]),
    "no causal mask": ("qwen3", {"is_causal": False}, (), ["is_causal=False"]),
    "attention in chunks": ("llama", {"attention_chunk_size": 8}, (), ["attention_chunk_size"]),
    "biases": ("llama", {"attention_bias": True}, (), ["attention_bias=True"]),
    "biases of the MLP": ("llama", {"mlp_bias": True}, (), ["mlp_bias=True"]),
    "another activation": ("qwen3", {"hidden_act": "gelu"}, (), ["hidden_act='gelu'"]),
    "yarn": (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        (),
        ["yarn"],
    ),
    "llama3 of other factors": (
        "llama",
        {"rope_parameters": tiny_models.LLAMA3_ROPE | {"low_freq_factor": 2.0}},
        (),
        ["low_freq_factor"],
    ),
    "another original length at the top": (
        "llama",
        {"original_max_position_embeddings": 4096},
        (),
        ["4096"],
    ),
    "half of a head rotated": ("llama", {"partial_rotary_factor": 0.5}, (), ["partial_rotary"]),
    "a theta that is a text": ("qwen3", {"rope_theta": "1"}, ("rope_parameters",), ["rope_theta"]),
    "a theta of null": ("qwen3", {"rope_theta": None}, ("rope_parameters",), ["rope_theta=None"]),
    "rope_parameters that are a list": ("qwen3", {"rope_parameters": [1]}, (), ["config.json"]),
    "a factor that is a text": (
        "llama",
        {"rope_parameters": tiny_models.LLAMA3_ROPE | {"factor": "8"}},
        (),
        ["config.json"],
    ),
    "an unknown key": ("qwen3", {"residual_scale": 2.0}, (), ["residual_scale"]),
    "a billion layers": ("qwen3", {"num_hidden_layers": 10**9}, (), ["num_hidden_layers"]),
    "a billion experts": ("moe", {"num_local_experts": 10**9}, (), ["mlp.gate"]),
    "an odd size of heads": ("qwen3", {"head_dim": 11}, (), ["head_dim", "=11"]),
    "a quantisation": (
        "qwen3",
        {"quantization_config": {"quant_method": "fp8"}},
        (),
        ["quantised", "quantization_config"],
    ),
    "weights in a file of another name": (
        "qwen3",
        {"transformers_weights": "other.safetensors"},
        (),
        ["transformers_weights"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_computed_otherwise_is_refused_by_name(folder, name):
    model, changes, absent, said = REFUSED[name]
    assert_refused(folder(model, changes, absent), *said)


KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"),
    *("max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "layer_types"),
    *("original_max_position_embeddings", "partial_rotary_factor", "sliding_window", "is_causal"),
    *("use_sliding_window", "max_window_layers", "hidden_act", "attention_bias", "mlp_bias"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "dtype", "torch_dtype"),
    *("pad_token_id", "eos_token_id", "return_dict", "model_type", "architectures", "use_cache"),
    *("output_attentions", "attention_dropout", "id2label", "problem_type", "auto_map"),
)
ROPES = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "llama3", "linear", "dynamic", None, 3, []]),
        "type": st.sampled_from(["default", "llama3", "yarn"]),
        "rope_theta": st.sampled_from([1e4, 1e6, 500000, 0, -1.0, None, "1e4", True]),
        "factor": st.sampled_from([8.0, 8, 2.0, None, "8"]),
        "low_freq_factor": st.sampled_from([1.0, 1, 2.0]),
        "high_freq_factor": st.sampled_from([4.0, 4, 8.0]),
        "original_max_position_embeddings": st.sampled_from([8192, 4096, None]),
        "full_attention": st.just({"rope_type": "default", "rope_theta": 1e4}),
    },
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16, 32, 48, 64, 259, 1e-6, 1e-5, 0.5, 1e6, 10**12]),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["silu", "gelu", "bfloat16", "float32", "qwen2", "qwen3", "llama", "load"]),
    st.sampled_from([[], [0], ["full_attention"] * 4, ["sliding_attention"] * 4, {}, {"a": 1}]),
    ROPES,
)
CHANGES = st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=6)), VALUES, max_size=3)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(list(MODELS)), CHANGES, st.sets(st.sampled_from(KEYS), max_size=1))
@example("llama", {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1e4}}, set())
@example("moe", {}, {"norm_topk_prob"})
@example("qwen2", {"is_causal": 1}, set())
def test_any_mutation_is_refused_or_gives_the_logits_of_transformers(
    models, tmp_path, name, changes, absent
):
    directory = Path(shutil.copytree(models[name], tmp_path / "model", dirs_exist_ok=True))
    change_config(directory, changes, absent)
    try:
        assert_same_logits(directory)
    except UserError as error:
        assert len(str(error).splitlines()) == 1


# Names and files of tensors


@pytest.mark.parametrize("name", MODELS)
def test_the_expected_tensors_are_those_that_transformers_writes(models, name):
    hf = read_hf_config(models[name])
    found = {n: tuple(t.shape) for n, t in load_file(models[name] / SINGLE).items()}
    assert dict(expected_shapes(hf)) == found


def without_prefix(weights):
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def with_two_prefixes(weights):
    return {f"model.{name}": tensor for name, tensor in weights.items()}


def head_for_embedding(weights):
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in weights.items()}


def embedding_twice(weights):
    return weights | {HEAD: weights[EMBEDDING].clone()}


def with_frequencies(weights):
    return weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tied", without_prefix),
        ("qwen2", without_prefix),  # except for the head, which has none
        ("moe", without_prefix),
        ("qwen3", with_two_prefixes),
        ("tied", head_for_embedding),
        ("tied", lambda weights: without_prefix(head_for_embedding(weights))),
        ("tied", embedding_twice),
        ("llama", with_frequencies),
    ],
)
def test_names_are_resolved_as_transformers_does(models, folder, name, change):
    directory = folder(name)
    change_tensors(directory, change)
    with HFTensors(directory, tied=name == "tied") as tensors:
        names = tensors.names()
    assert names >= load_file(models[name] / SINGLE).keys()
    assert_same_logits(directory)


def test_experts_in_one_tensor_are_read(models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models["moe"], dtype=torch.float32)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    stored = load_file(tmp_path / "fused" / SINGLE)
    assert any(name.endswith("experts.gate_up_proj") for name in stored)
    expected = load_file(models["moe"] / SINGLE)
    with HFTensors(tmp_path / "fused") as tensors:
        assert tensors.names() == expected.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert_same_logits(tmp_path / "fused")


def split(directory, names_of):
    """Move tensors into separate files, with an index."""
    weights, weight_map = load_file(directory / SINGLE), {}
    (directory / SINGLE).unlink()
    for number, names in enumerate(names_of(sorted(weights))):
        file = directory / f"parts/{number}/part.safetensors"
        file.parent.mkdir(parents=True)
        save_file({name: weights[name] for name in names}, file, metadata={"format": "pt"})
        weight_map |= {name: str(file.relative_to(directory)) for name in names}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards_in_folders_are_read(folder):
    directory = folder("qwen3")
    split(directory, lambda names: (names[::2], names[1::2]))
    assert_same_logits(directory)


def test_a_single_file_comes_before_an_index(folder):
    """The files of the index hold other numbers."""
    directory = folder("qwen3")
    whole = (directory / SINGLE).read_bytes()
    change_tensors(directory, lambda weights: {n: 2 * t for n, t in weights.items()})
    split(directory, lambda names: (names,))
    other = assert_same_logits(directory)
    (directory / SINGLE).write_bytes(whole)
    assert not torch.equal(assert_same_logits(directory), other)


def test_other_files_of_weights_are_not_read(folder):
    """An example is Mistral's own format next to that of Hugging Face."""
    directory = folder("qwen3")
    shutil.copy(directory / SINGLE, directory / "consolidated.safetensors")
    assert_same_logits(directory)
    (directory / SINGLE).unlink()
    assert_refused(directory, "no weights", "consolidated.safetensors")


@pytest.mark.parametrize("outside", ["../other.safetensors", "/other.safetensors", "a/../../b"])
def test_an_index_does_not_lead_out_of_its_folder(folder, outside):
    directory = folder("qwen3")
    split(directory, lambda names: (names,))
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][EMBEDDING] = outside
    (directory / INDEX).write_text(json.dumps(index))
    assert_refused(directory, INDEX, "outside")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("qwen3", lambda w: {n: t for n, t in w.items() if n != HEAD}, ["lacks", HEAD]),
        ("qwen3", lambda w: {n: t for n, t in w.items() if n != EMBEDDING}, ["lacks", EMBEDDING]),
        ("tied", lambda w: w | {HEAD: w[EMBEDDING] + 1}, ["ties", "tie_word_embeddings"]),
        ("qwen3", lambda w: {f"base.{n}": t for n, t in w.items()}, ["lacks", "more"]),
        ("qwen3", lambda w: w | {"norm.weight": torch.ones(32)}, ["model.norm.weight", "and in"]),
        ("qwen3", lambda w: w | {"model.norm.weight": torch.ones(32).int()}, ["int32"]),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(folder, name, change, said):
    directory = folder(name)
    change_tensors(directory, change)
    assert_refused(directory, *said)


@pytest.mark.parametrize(
    "suffix",
    ["qweight", "qzeros", "weight_scale", "weight_scale_inv", "weight_packed", "weight.absmax"],
)
def test_a_quantised_model_is_called_that(folder, suffix):
    directory, place = folder("qwen3"), "model.layers.0.mlp.up_proj."

    def quantise(weights):
        weights[place + suffix] = weights.pop(place + "weight")
        return weights

    change_tensors(directory, quantise)
    assert_refused(directory, "quantised", place + suffix)


def test_an_adapter_is_called_that(folder):
    directory = folder("qwen3")
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert_refused(directory, "adapter")


def test_no_list_of_names_is_longer_than_ten(folder):
    directory = folder("moe")
    change_tensors(directory, lambda w: {n: t for n, t in w.items() if ".experts." not in n})
    assert_refused(directory, "lacks", "and 86 more")


# That a mistake would be seen


@pytest.mark.parametrize(
    "settings_of_ours",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
        {"rms_norm_eps": 1e-3},
    ],
)
def test_the_tiny_instance_sees_another_reading(models, monkeypatch, settings_of_ours):
    right = tiny_instance.read_hf_config

    def wrong(directory):
        return copy.deepcopy(right(directory)) | settings_of_ours

    assert tiny_instance.check(models["llama"]).passed
    monkeypatch.setattr(tiny_instance, "read_hf_config", wrong)
    with pytest.raises(UserError, match="logits differ from those of transformers"):
        tiny_instance.check(models["llama"])
