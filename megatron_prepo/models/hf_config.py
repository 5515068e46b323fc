"""Translation of a Hugging Face `config.json` to Megatron-Core's arguments.

The file is read only by the configuration class of `transformers`, with its defaults and its
precedence of old and new keys (`rope_scaling` before `rope_parameters`, for instance).  The
resulting values are then accepted, or rejected by name if Megatron-Core would compute something
else.  A key that is neither supported here nor known to have no influence on logits is rejected as
well.
"""

import json
import math
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_prepo.errors import UserError

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
MUST_BE_THERE = {*SIZES} - {"num_key_value_heads", "head_dim", "max_position_embeddings"}
"""Sizes of tensors: a file without them is damaged, whatever the default of a class is."""
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Constants of Megatron-Core's rope scaling."""
ONLY = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "sliding_window": None,
    "is_causal": True,
    "is_encoder_decoder": False,
    "return_dict": True,
    "chunk_size_feed_forward": 0,
    "partial_rotary_factor": 1.0,
}
"""Supported values of settings that the families' configuration classes have."""
EXEMPT = {("attention_bias", "qwen2"), ("sliding_window", "mistral")}
"""Settings of ONLY that a family may have otherwise: Qwen2 ignores its own, Mistral's is used."""
ONLY_EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": []}
"""Supported values for mixtures of experts."""
READ = {*SIZES, *EXPERT_SIZES, *ONLY, *ONLY_EXPERTS, "norm_topk_prob", "model_type"}
READ |= {"rms_norm_eps", "tie_word_embeddings"}
READ |= {"rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings"}
READ |= {"layer_types", "use_sliding_window", "num_local_experts"}
QUANTIZATION_KEYS = {"quantization_config", "compression_config"}
NO_INFLUENCE = {
    # about the file, its type, and heads other than the language model's
    *("architectures", "auto_map", "transformers_version", "name_or_path", "tokenizer_class"),
    *("_name_or_path", "_commit_hash", "_attn_implementation_autoset", "dtype", "torch_dtype"),
    *("_attn_implementation_internal", "_experts_implementation_internal", "model_max_length"),
    *("id2label", "label2id", "num_labels", "problem_type", "classifier_dropout", "language"),
    *("task_specific_params", "finetuning_task", "torchscript", "tf_legacy_loss", "use_bfloat16"),
    *("unsloth_fixed", "unsloth_version", "model_name", "base_model", "datasets", "license"),
    *("is_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder"),
    *("pruned_heads", "return_dict_in_generate", "prefix", "sep_token_id", "unk_token_id"),
    # for training, and for kernels
    *("attention_dropout", "hidden_dropout", "initializer_range", "output_router_logits"),
    *("embd_pdrop", "resid_pdrop", "attn_pdrop", "router_aux_loss_coef", "pretraining_tp"),
    *("max_window_layers", "use_mrope", "use_flash_attn", "use_flash_attention_2", "seq_length"),
    "transformers.js_config",
    "_model_name_or_path",  # of a GGUF file
}
"""Keys that do not change logits of these families, in addition to generation settings."""
NO_CHANGE = {
    "is_llama_config": (True,),
    "rope_interleaved": (False,),
    "qkv_bias": (False,),
    "shared_expert_intermediate_size": (0, None),
}
"""Keys that `transformers` ignores, with the values that agree with what it computes."""


def read_hf_config(
    directory: str | Path, *, quantized: bool = False, for_megatron: bool = True
) -> dict[str, Any]:
    """Return a model's complete architecture as a `config.json` that gives the same logits.

    Keys of SIZES, `model_type`, `architectures`, `rms_norm_eps`, `tie_word_embeddings`,
    `rope_parameters`, for mixtures of experts EXPERT_SIZES and `norm_topk_prob`, for Mistral
    `sliding_window` (None: no window); all are explicit, as `transformers` reads the file.
    `quantized`: the weights come from another place, so the file may describe quantised ones.
    `for_megatron`: Megatron-Core must compute what `transformers` computes; an engine that only
    generates may support more.

    Raises UserError with one line for a missing or damaged file, and for an unsupported
    computation.
    """
    path = Path(directory) / "config.json"
    raw = read_json(path)
    if str(raw.get("model_type")) not in FAMILIES:
        raise UserError(
            f"{path}: model_type {reprlib.repr(raw.get('model_type'))} is not one of "
            f"{', '.join(FAMILIES)}"
        )
    if not quantized and (keys := QUANTIZATION_KEYS & {k for k, v in raw.items() if v is not None}):
        raise UserError(
            f"{path} has {min(keys)}: quantised models are not supported; use the original "
            "weights, or dequantise them and remove the key"
        )
    moe = raw["model_type"] == "qwen3_moe"
    needed = sorted(MUST_BE_THERE) + (list(EXPERT_SIZES[1:]) if moe else [])
    missing = [name for name in needed if raw.get(name) is None]
    if moe and raw.get("num_experts", raw.get("num_local_experts")) is None:
        missing.append("num_experts")
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    _check_sizes(path, {name: value for name, value in raw.items() if value is not None})
    if for_megatron:
        _refuse_unknown(path, raw)
    hf = _as_transformers_reads(path, raw)
    if for_megatron:
        _refuse_other_computations(path, hf)
    settings = {name: hf[name] for name in ("model_type", "architectures", *SIZES)}
    settings |= {name: hf[name] for name in ("hidden_act", "rms_norm_eps", "tie_word_embeddings")}
    if moe:
        names = (*EXPERT_SIZES, *ONLY_EXPERTS, "norm_topk_prob")
        settings |= {name: hf[name] for name in names}
    if raw["model_type"] == "mistral":
        settings["sliding_window"] = hf["sliding_window"]
    _check_numbers(path, settings)
    return settings | {
        "rope_parameters": _rope_parameters(path, hf) if for_megatron else hf["rope_parameters"]
    }


def transformer_settings(hf: dict[str, Any]) -> dict[str, Any]:
    """Return fields of Megatron-Core's TransformerConfig."""
    heads = hf["num_attention_heads"]
    further = _experts(hf) | _window(hf)
    return further | {
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
        "add_qkv_bias": hf["model_type"] == "qwen2",
        "qk_layernorm": hf["model_type"] in ("qwen3", "qwen3_moe"),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def gpt_settings(hf: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of Megatron-Core's GPTModel other than its TransformerConfig."""
    rope = hf["rope_parameters"]
    settings = {
        "max_sequence_length": hf["max_position_embeddings"],
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": bool(hf.get("tie_word_embeddings")),
        "rotary_base": rope["rope_theta"],
    }
    if rope["rope_type"] == "llama3":
        settings |= {"rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}
    return settings


def num_experts(hf: dict[str, Any]) -> int:
    """Return the number of experts per layer, 0 for a dense model."""
    return hf["num_experts"] if hf["model_type"] == "qwen3_moe" else 0


def sliding_window(hf: dict[str, Any]) -> int | None:
    """Return the number of tokens that a token attends to, including itself; None: all."""
    return hf["sliding_window"] if hf["model_type"] == "mistral" else None


def _experts(hf: dict[str, Any]) -> dict[str, Any]:
    if not num_experts(hf):
        return {}
    return {
        "num_moe_experts": num_experts(hf),
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        # a softmax over all experts, of which each chosen expert keeps its part; or normalised,
        # which is a softmax over the chosen experts only
        "moe_router_pre_softmax": not hf["norm_topk_prob"],
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "none",
    }


def _window(hf: dict[str, Any]) -> dict[str, Any]:
    if (size := sliding_window(hf)) is None:
        return {}
    return {"window_size": (size - 1, 0)}  # Megatron-Core counts the tokens on each side


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.  Raises UserError for any other file."""
    if not path.is_file():
        raise UserError(f"no Hugging Face model in {path.parent}: {path} is missing")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path} is not valid JSON: nested too deeply") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except ValueError as error:  # also for bytes that are not text, and for huge numbers
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object")
    return raw


def _refuse_unknown(path: Path, raw: dict[str, Any]) -> None:
    """Raise UserError for a key that is not known to have no influence on the computation."""
    from transformers import GenerationConfig

    known = READ | NO_INFLUENCE | QUANTIZATION_KEYS | vars(GenerationConfig()).keys()
    if raw.get("model_type") in ("qwen3", "qwen3_moe"):
        known = known | ({"use_qk_norm"} if raw.get("use_qk_norm") is True else set())
    unknown = [name for name in raw if name not in known]
    if unknown := [name for name in unknown if raw[name] not in NO_CHANGE.get(name, ())]:
        raise UserError(
            f"{path}: {listed(unknown)} may change what the model computes, and is not supported; "
            "remove it if it does not"
        )


def _as_transformers_reads(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return all attributes of the `transformers` object for the file, and derived sizes.

    Never runs code from the model's directory.
    """
    from transformers import AutoConfig

    try:
        theirs = AutoConfig.from_pretrained(
            path.parent, local_files_only=True, trust_remote_code=False
        )
        # again, as the model does: an original length outside the rope is only now applied
        theirs.standardize_rope_params()
    except Exception as error:  # their validation raises various types for invalid values
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: transformers rejects it: {type(error).__name__}: {reason[:300]}"
        ) from error
    hf: dict[str, Any] = {"model_type": raw["model_type"], **vars(theirs)}
    if raw["model_type"] == "qwen3_moe":
        hf["num_experts"] = theirs.num_experts  # stored under another name
    if "head_dim" not in hf:  # the default in the attention of Qwen2 and Qwen3-MoE
        hf["head_dim"] = hf["hidden_size"] // hf["num_attention_heads"]
    return hf


def _refuse_other_computations(path: Path, hf: dict[str, Any]) -> None:
    """Raise UserError for settings with which Megatron-Core would compute something else."""
    moe = hf["model_type"] == "qwen3_moe"
    for name, value in (ONLY | (ONLY_EXPERTS if moe else {})).items():
        if name not in hf or (name, hf["model_type"]) in EXEMPT:
            continue
        # 1 equals True, and transformers fails with is_causal=1
        if hf[name] != value or isinstance(hf[name], bool) != isinstance(value, bool):
            raise UserError(
                f"{path}: {name}={reprlib.repr(hf[name])} is not supported, only {value!r} is"
            )
    if set(hf.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(f"{path}: layer_types other than 'full_attention' are not supported")


def _check_sizes(path: Path, hf: dict[str, Any]) -> None:
    """Raise UserError for an invalid size or epsilon among those that are set."""
    for name in (*SIZES, *EXPERT_SIZES):
        # transformers creates a list with one element per layer
        most = 1 << 16 if name == "num_hidden_layers" else 1 << 31
        if name in hf and (type(hf[name]) is not int or not 0 < hf[name] < most):
            raise UserError(f"{path}: {name}={reprlib.repr(hf[name])} is not a valid size")
    if "rms_norm_eps" in hf and (not _is_number(hf["rms_norm_eps"]) or hf["rms_norm_eps"] < 0):
        raise UserError(
            f"{path}: rms_norm_eps={reprlib.repr(hf['rms_norm_eps'])} is not a valid number"
        )


def _check_numbers(path: Path, hf: dict[str, Any]) -> None:
    _check_sizes(path, hf)
    for name in ("tie_word_embeddings", "norm_topk_prob"):
        if name in hf and type(hf[name]) is not bool:
            raise UserError(f"{path}: {name}={reprlib.repr(hf[name])} is not a boolean")
    heads, groups = hf["num_attention_heads"], hf["num_key_value_heads"]
    if heads % groups:
        raise UserError(
            f"{path}: num_key_value_heads={groups} does not divide num_attention_heads={heads}"
        )
    if hf["head_dim"] % 2:
        raise UserError(
            f"{path}: head_dim={hf['head_dim']} is odd; rotary embeddings need an even size"
        )
    window = sliding_window(hf)
    if window is not None and (type(window) is not int or window < 1):
        raise UserError(
            f"{path}: sliding_window={reprlib.repr(window)} is not a valid size; use null for none"
        )
    if hf.get("num_experts_per_tok", 0) > hf.get("num_experts", 0):
        raise UserError(
            f"{path}: num_experts_per_tok={hf['num_experts_per_tok']} is more than "
            f"num_experts={hf['num_experts']}"
        )


def _rope_parameters(path: Path, hf: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_type`, `rope_theta` and the further parameters of Llama 3's scaling."""
    rope = hf["rope_parameters"]
    kind = rope.get("rope_type")
    if kind not in ("default", "llama3"):
        raise UserError(
            f"{path}: rope scaling {reprlib.repr(kind)} is not supported; only `default` and "
            "`llama3` are"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: partial_rotary_factor is not supported")
    names = ("rope_theta", "factor", *LLAMA3_ROPE) if kind == "llama3" else ("rope_theta",)
    for name in names:
        if not _is_number(rope.get(name)) or rope[name] <= 0:
            raise UserError(
                f"{path}: {name}={reprlib.repr(rope.get(name))} of the rope is not a positive "
                "number"
            )
    if kind == "llama3" and any(rope[name] != value for name, value in LLAMA3_ROPE.items()):
        found = {name: rope[name] for name in LLAMA3_ROPE}
        raise UserError(
            f"{path}: Megatron-Core fixes the rope scaling to {LLAMA3_ROPE}; the model has {found}"
        )
    return {"rope_type": kind} | {name: rope[name] for name in names}


def _is_number(value: Any) -> bool:
    """Return whether a value is an int or float that a float can represent."""
    if type(value) not in (int, float):
        return False
    return abs(value) < 1 << 1000 and math.isfinite(value)


def listed(names: Iterable[str]) -> str:
    """Return the first ten names and the number of further ones, in one line."""
    names = list(names)
    first = [n if n.isprintable() and 0 < len(n) < 200 else reprlib.repr(n) for n in names[:10]]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(first) + more
