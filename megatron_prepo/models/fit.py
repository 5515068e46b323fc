"""Check that a Hugging Face directory has the tensors of its `config.json`, by names and shapes.

Little more than the headers of the files is read, so the check before a run or a conversion is
fast.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_config import listed, num_experts
from megatron_prepo.models.hf_files import EMBEDDING, HEAD, HFTensors

MOST_MISSING = 1000
"""Missing names after which the search stops: a damaged config.json may describe billions."""


def expected_shapes(hf: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor of a model with the settings of `read_hf_config`."""
    hidden, head = hf["hidden_size"], hf["head_dim"]
    queries, keys = hf["num_attention_heads"] * head, hf["num_key_value_heads"] * head
    yield EMBEDDING, (hf["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    if not hf["tie_word_embeddings"]:
        yield HEAD, (hf["vocab_size"], hidden)
    for layer in range(hf["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        yield name + "input_layernorm.weight", (hidden,)
        yield name + "post_attention_layernorm.weight", (hidden,)
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{name}self_attn.{part}_proj.weight", (rows, hidden)
            if hf["model_type"] == "qwen2":
                yield f"{name}self_attn.{part}_proj.bias", (rows,)
        yield name + "self_attn.o_proj.weight", (hidden, queries)
        if hf["model_type"] in ("qwen3", "qwen3_moe"):
            yield name + "self_attn.q_norm.weight", (head,)
            yield name + "self_attn.k_norm.weight", (head,)
        mlps: Iterable[str] = ["mlp."]
        width = hf["intermediate_size"]
        if experts := num_experts(hf):
            yield name + "mlp.gate.weight", (experts, hidden)
            mlps, width = (f"mlp.experts.{e}." for e in range(experts)), hf["moe_intermediate_size"]
        for mlp in mlps:
            yield f"{name}{mlp}gate_proj.weight", (width, hidden)
            yield f"{name}{mlp}up_proj.weight", (width, hidden)
            yield f"{name}{mlp}down_proj.weight", (hidden, width)


def check_fit(tensors: HFTensors, hf: dict[str, Any]) -> None:
    """Raise UserError unless the directory has exactly the tensors of the model, in their shapes.

    A tied model's files may repeat the embedding as the head, and old files have rotary
    frequencies, which are computed instead.
    """
    missing, known = [], set()
    for name, shape in expected_shapes(hf):
        known.add(name)
        if name not in tensors.places:
            missing.append(name)
            if len(missing) == MOST_MISSING:
                break
        elif (found := tensors.places[name].shape) != shape:
            raise UserError(
                f"{tensors.directory}: {name} has shape {found}, but by config.json {shape}"
            )
        elif not tensors.places[name].dtype.is_floating_point:
            raise UserError(f"{tensors.directory}: {name} is {tensors.places[name].dtype}")
    if missing:
        raise UserError(f"{tensors.directory} lacks tensors: {listed(missing)}")
    left = [n for n in tensors.places if n not in known and not n.endswith("rotary_emb.inv_freq")]
    if hf["tie_word_embeddings"] and HEAD in left:
        left.remove(HEAD)
        check_tied_head(tensors)
    if left:
        raise UserError(
            f"{tensors.directory} has tensors that are not part of the model: "
            f"{listed(sorted(left))}"
        )


def check_tied_head(tensors: HFTensors) -> None:
    """Raise UserError if a tied model's files have a head that differs from the embedding.

    `transformers` then does not tie them, contrary to `config.json`.
    """
    if not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise UserError(
            f"{tensors.directory}: config.json ties the embeddings, but {HEAD} differs from the "
            "embedding; set tie_word_embeddings to false"
        )
