"""Load a Megatron model from Hugging Face safetensors; each rank reads only its own tensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from megatron_prepo.errors import UserError
from megatron_prepo.models.fit import check_tied_head
from megatron_prepo.models.hf_config import listed
from megatron_prepo.models.hf_files import HEAD, HFTensors
from megatron_prepo.models.mapping import (
    Heads,
    Mapping,
    find_mapping,
    is_adapter,
    shard,
    to_megatron,
)


def stage_parameters(
    chunks: Sequence[torch.nn.Module],
) -> list[tuple[str, Mapping, torch.nn.Parameter]]:
    """Return (Megatron's name, mapping, parameter) of this rank's (unwrapped) GPTModels.

    Without adapters, which are not tensors of the Hugging Face model (`lora.py`).
    """
    return [parameter for chunk in chunks for parameter in _chunk_parameters(chunk)]


def _chunk_parameters(model: torch.nn.Module) -> list[tuple[str, Mapping, torch.nn.Parameter]]:
    layers = model.decoder.layers
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    experts_here = (model.config.num_moe_experts or 0) // model.config.expert_model_parallel_size
    first_expert = parallel_state.get_expert_model_parallel_rank() * experts_here
    tied = model.share_embeddings_and_output_weights
    return [
        (
            name,
            find_mapping(name, first_layer=first_layer, first_expert=first_expert, tied=tied),
            parameter,
        )
        for name, parameter in model.named_parameters()
        if not is_adapter(name)
    ]


def attention_heads(config: TransformerConfig) -> Heads:
    """Return the attention geometry of a TransformerConfig."""
    return Heads(
        num_groups=config.num_query_groups,
        head_dim=config.kv_channels,
        queries_per_group=config.num_attention_heads // config.num_query_groups,
    )


def split_group(mapping: Mapping) -> dist.ProcessGroup:
    """Return the group of ranks over which a parameter is split."""
    if mapping.expert is not None:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


@torch.no_grad()
def load_hf_weights(chunks: Sequence[torch.nn.Module], directory: str | Path) -> None:
    """Copy a Hugging Face checkpoint into this rank's (unwrapped) GPTModels.

    Collective over all ranks, which together must use every tensor of the files.
    Raises UserError for a missing file or tensor, a shape that does not fit, or an unused tensor.
    """
    heads = attention_heads(chunks[0].config)
    mine = stage_parameters(chunks)
    tied = chunks[0].share_embeddings_and_output_weights
    with HFTensors(directory, tied=tied) as tensors:
        for _, mapping, parameter in mine:
            group = split_group(mapping)
            try:
                full = to_megatron(mapping, [tensors[name] for name in mapping.hf_names], heads)
                part = shard(mapping, full, parameter.shape, group.rank(), group.size())
            except ValueError as error:
                raise UserError(f"{directory} does not fit its config.json: {error}") from error
            parameter.copy_(part)
        used: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(used, [n for _, mapping, _ in mine for n in mapping.hf_names])
        refuse_leftover(tensors, set().union(*used), tied)


def refuse_leftover(tensors: HFTensors, used: set[str], tied: bool) -> None:
    """Raise UserError if the files have a tensor that no rank used.

    A tied model's files may repeat the embedding as `lm_head.weight` (it must then be equal), and
    old files have rotary frequencies, which are computed instead.
    """
    left = {name for name in tensors.names() - used if not name.endswith("rotary_emb.inv_freq")}
    if tied and HEAD in left:
        left.remove(HEAD)
        check_tied_head(tensors)
    if left:
        raise UserError(
            f"{tensors.directory} has tensors that are not part of the model: "
            f"{listed(sorted(left))}"
        )
