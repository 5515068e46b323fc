"""What a Hugging Face `config.json` means in Megatron-Core's arguments.

The file itself is read, not a library's idea of it: `transformers` 5 moved `rope_theta` into
`rope_parameters`, and a reader of the other version takes a default without a word.
"""

import json
import reprlib
from pathlib import Path

from megatron_prepo.errors import UserError

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "llama")
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "vocab_size",
)
SIZES = {*REQUIRED, "head_dim", "num_key_value_heads"} - {"rms_norm_eps"}
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Fixed in Megatron-Core's rope scaling, besides the original length of 8192."""


def read_hf_config(directory: str | Path) -> dict:
    """`config.json` of a Hugging Face directory.  Raises UserError where there is none."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"no Hugging Face model in {directory}: {path} is missing")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path} is not valid JSON: nested too deeply") from None
    except ValueError as error:  # also of bytes that are no text, and of numbers without end
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(hf, dict):
        raise UserError(f"{path} is not a JSON object")
    if str(hf.get("model_type")) not in FAMILIES:
        raise UserError(
            f"{path}: model_type {hf.get('model_type')!r} is not one of {', '.join(FAMILIES)}"
        )
    if missing := [name for name in REQUIRED if hf.get(name) is None]:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    for name in SIZES:
        size = hf.get(name)
        if size is not None and (type(size) is not int or not 0 < size < 1 << 31):
            raise UserError(f"{path}: {name}={reprlib.repr(size)} is no size")
    if not isinstance(hf["rms_norm_eps"], float | int):
        raise UserError(f"{path}: rms_norm_eps={reprlib.repr(hf['rms_norm_eps'])} is no number")
    return hf


def transformer_settings(hf: dict) -> dict:
    """Fields of Megatron-Core's TransformerConfig."""
    _refuse(hf, "hidden_act", "silu")
    _refuse(hf, "mlp_bias", False)
    _refuse(hf, "use_sliding_window", False)
    heads = hf["num_attention_heads"]
    return _experts(hf) | {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // heads,
        "layernorm_epsilon": hf["rms_norm_eps"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        # Qwen2's bias is in its code, not in its configuration
        "add_qkv_bias": hf["model_type"] == "qwen2" or bool(hf.get("attention_bias")),
        "qk_layernorm": hf["model_type"] in ("qwen3", "qwen3_moe"),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def gpt_settings(hf: dict) -> dict:
    """Arguments of Megatron-Core's GPTModel beside its TransformerConfig."""
    return {
        "max_sequence_length": hf["max_position_embeddings"],
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": bool(hf.get("tie_word_embeddings")),
        **_rope(hf),
    }


def num_experts(hf: dict) -> int:
    """Experts of a layer, 0 for a dense model."""
    if hf["model_type"] != "qwen3_moe":
        return 0
    count = hf.get("num_experts") or hf.get("num_local_experts")
    if not count:
        raise UserError("config.json has neither num_experts nor num_local_experts")
    return count


def _experts(hf: dict) -> dict:
    if not num_experts(hf):
        return {}
    _refuse(hf, "mlp_only_layers", [])
    _refuse(hf, "decoder_sparse_step", 1)
    _refuse(hf, "norm_topk_prob", True)
    return {
        "num_moe_experts": num_experts(hf),
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        # softmax over the chosen experts' logits is what norm_topk_prob does
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "none",
    }


def _rope(hf: dict) -> dict:
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta")
    if theta is None:
        raise UserError("config.json has no rope_theta, neither at the top nor in rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rotary_base": theta}
    if kind != "llama3":
        raise UserError(f"rope scaling {kind!r} is not supported; only `default` and `llama3` are")
    fixed = LLAMA3_ROPE | {"original_max_position_embeddings": 8192}
    if missing := {"factor", *fixed} - rope.keys():
        raise UserError(f"config.json: the rope scaling lacks {', '.join(sorted(missing))}")
    if any(float(rope[name]) != value for name, value in fixed.items()):
        raise UserError(f"Megatron-Core fixes the rope scaling to {fixed}; the model has {rope}")
    return {
        "rotary_base": theta,
        "rope_scaling": True,
        "rope_scaling_factor": float(rope["factor"]),
    }


def _refuse(hf: dict, name: str, expected) -> None:
    if (value := hf.get(name, expected)) != expected:
        raise UserError(f"config.json: {name}={value!r} is not supported, only {expected!r} is")
