"""Record of the model in a Megatron checkpoint, and its comparison with a `config.json`.

Megatron's trainers store this record next to the tensors: `args` in `common.pt`, under their names.
None of it is visible in the shapes of tensors, so weights could be used with another architecture
without an error.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_prepo.config import LoraConfig
from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_config import (
    gpt_settings,
    listed,
    read_hf_config,
    transformer_settings,
)
from megatron_prepo.models.torch_dist import TorchDistReader

HF_FILES = "hf"
"""Folder of an imported checkpoint with the model's configuration and tokenizer files."""
ADAPTERS = "lora"
"""Entry of a checkpoint with the settings of its adapters."""
HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "rotary_base": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "layernorm_epsilon": "rms_norm_eps",
    "untie_embeddings_and_output_weights": "not tie_word_embeddings",
    "use_rope_scaling": "rope_type llama3",
    "rope_scaling_factor": "factor of the rope",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_pre_softmax": "not norm_topk_prob",
    "window_size": "(sliding_window - 1, 0), or () for none,",
}
"""Megatron's name -> the name in `config.json`, if it differs."""

OTHER_FUNCTION = {
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (1,),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "squared_relu": (False,),
    "softmax_scale": (),
    "softmax_type": ("vanilla",),
    "window_attn_skip_freq": (),
    "no_rope_freq": (),
    "multi_latent_attention": (False,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (1.0,),
    "moe_router_enable_expert_bias": (False,),
    "moe_shared_expert_intermediate_size": (0,),
}
"""Other fields that Megatron's trainers may record, with the values of our families, if any."""


def architecture_record(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that Megatron's trainers read besides tensors: the architecture."""
    mcore, gpt = transformer_settings(settings), gpt_settings(settings)
    args = Namespace(
        **{n: mcore[n] for n in ("num_layers", "hidden_size", "ffn_hidden_size", "kv_channels")},
        num_attention_heads=mcore["num_attention_heads"],
        num_query_groups=mcore["num_query_groups"],
        group_query_attention=mcore["num_query_groups"] != mcore["num_attention_heads"],
        max_position_embeddings=gpt["max_sequence_length"],
        position_embedding_type=gpt["position_embedding_type"],
        rotary_base=gpt["rotary_base"],
        untie_embeddings_and_output_weights=not gpt["share_embeddings_and_output_weights"],
        normalization=mcore["normalization"],
        norm_epsilon=mcore["layernorm_epsilon"],
        layernorm_epsilon=mcore["layernorm_epsilon"],
        use_rope_scaling="rope_scaling_factor" in gpt,
        rope_scaling_factor=gpt.get("rope_scaling_factor"),
        window_size=mcore.get("window_size"),
        moe_router_topk=mcore.get("moe_router_topk"),
        moe_ffn_hidden_size=mcore.get("moe_ffn_hidden_size"),
        moe_router_pre_softmax=mcore.get("moe_router_pre_softmax"),
        add_qkv_bias=mcore["add_qkv_bias"],
        qk_layernorm=mcore["qk_layernorm"],
        num_experts=mcore.get("num_moe_experts"),
        swiglu=True,
        vocab_size=settings["vocab_size"],
    )
    return {"args": args, "iteration": 0, "checkpoint_version": 3.0}


def adapter_record(lora: LoraConfig | None) -> dict[str, Any]:
    """Return the entry that describes the adapters of a checkpoint; empty without adapters."""
    if lora is None or not lora.rank:
        return {}
    settings = {"rank": lora.rank, "alpha": lora.alpha}
    return {ADAPTERS: settings | {"target_modules": list(lora.target_modules)}}


def stored_adapters(reader: TorchDistReader) -> LoraConfig | None:
    """Return the settings of a checkpoint's adapters; None if it has none."""
    entry = reader.common().get(ADAPTERS)
    if entry is None:
        return None
    try:
        return TypeAdapter(LoraConfig).validate_python(entry)
    except ValidationError as error:
        raise UserError(f"{reader.directory}: its record of adapters is damaged") from error


def refuse_adapters(reader: TorchDistReader) -> None:
    """Raise UserError if a checkpoint has adapters next to the weights."""
    if stored_adapters(reader):
        raise UserError(
            f"model.megatron={reader.directory} has adapters (lora.rank) next to frozen weights; "
            "merge them by `python -m checkpoints_convert export`, and set model.hf to the result, "
            "without model.megatron"
        )


def check_record(checkpoint: Path, settings: dict[str, Any], where: str | Path) -> None:
    """Raise UserError, naming the fields, if the checkpoint's record differs from `settings`.

    `where`: the directory of the `config.json` with these settings.  Without a record in
    `common.pt`, the configuration files stored with the checkpoint are used.
    """
    args, source = TorchDistReader(checkpoint).common().get("args"), "its record"
    if args is None and (own := own_files(checkpoint)):
        args = architecture_record(read_hf_config(own, quantized=True))["args"]
        source = str(own)
    if args is None:
        return
    stored, given = comparable(args), comparable(architecture_record(settings)["args"])
    if stored.get("num_experts") and "num_experts" not in given:
        given = given | {"num_experts": None}
    unsupported = [
        f"{name} is {stored[name]!r} in {source}, which no supported family has"
        for name, values in OTHER_FUNCTION.items()
        if name in stored and stored[name] not in values
    ]
    differing = unsupported + [
        f"{HF_NAMES.get(name, name)} is {stored[name]!r} in {source} and {given[name]!r} in "
        "config.json"
        for name in stored
        if name in given and stored[name] != given[name]
    ]
    if differing:
        raise UserError(
            f"{checkpoint} was not created from the model of {where}: {listed(differing)}; use the "
            "configuration from which the checkpoint was created"
        )


def comparable(args: Namespace | dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a record that affect the computation, under Megatron's names."""
    if not isinstance(args, Namespace | dict):
        raise UserError(f"the record `args` of a checkpoint is a {type(args).__name__}")
    known = args if isinstance(args, dict) else vars(args)
    # earlier versions imported only models for which Megatron's default is right, and left it out
    window = known.get("window_size") or ()
    window = tuple(window) if isinstance(window, list) else window
    known = {"moe_router_pre_softmax": False} | known | {"window_size": window}
    dropped = {"max_position_embeddings"}  # a limit
    if not known.get("use_rope_scaling"):
        dropped.add("rope_scaling_factor")
    if not known.get("num_experts"):
        dropped |= {"moe_router_topk", "moe_ffn_hidden_size", "moe_router_pre_softmax"}
    if not known.get("group_query_attention", True):
        dropped.add("num_query_groups")
    return {n: value for n, value in known.items() if value is not None and n not in dropped}


def own_files(checkpoint: Path) -> Path | None:
    """Return the folder of configuration and tokenizer files stored with a checkpoint, if any."""
    for folder in (checkpoint / HF_FILES, checkpoint.parent / HF_FILES):
        if (folder / "config.json").is_file():
            return folder
    return None


def check_tokenizer(checkpoint: Path, hf: str | Path) -> None:
    """Raise UserError if a token id has different tokens in `hf` and the checkpoint's files.

    Tokens that only one of them has are not an error: many models have unused rows.
    """
    own = own_files(checkpoint)
    files = [Path(folder) / "tokenizer.json" for folder in (own, hf) if folder]
    if len(files) < 2 or not all(file.is_file() for file in files):
        return
    texts = [file.read_bytes() for file in files]
    if texts[0] == texts[1]:
        return
    mine, other = (_tokens(file, text) for file, text in zip(files, texts, strict=True))
    differing = [
        f"token {number} is {mine[number]!r} and {other[number]!r}"
        for number in sorted(mine.keys() & other.keys())
        if mine[number] != other[number]
    ]
    if differing:
        raise UserError(
            f"{files[0]} and {files[1]} are tokenizers of different models: {listed(differing)}"
        )


def _tokens(file: Path, text: bytes) -> dict[int, str]:
    """Return the token of each id."""
    try:
        tokenizer = json.loads(text)
        vocab = tokenizer["model"]["vocab"]
        if isinstance(vocab, dict):
            tokens = {number: token for token, number in vocab.items()}
        else:  # unigram model: pairs of token and score
            tokens = {number: token for number, (token, _) in enumerate(vocab)}
        added = {t["id"]: t["content"] for t in tokenizer.get("added_tokens") or ()}
        return tokens | added
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not a tokenizer file: {error!r}") from error
