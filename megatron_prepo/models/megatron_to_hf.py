"""Stream the weights of a Megatron model under Hugging Face names, for weight sync and export.

Adapters (`lora.py`) are merged into the weights: the result is a plain model.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from megatron_prepo.models.hf_files import HFWriter
from megatron_prepo.models.hf_to_megatron import attention_heads, split_group, stage_parameters
from megatron_prepo.models.lora import (
    Adapter,
    adapter_parameters,
    adapters,
    trained_parameters,
)
from megatron_prepo.models.mapping import Mapping, to_hf, unshard


class Part(NamedTuple):
    """A parameter of a pipeline stage, as each rank of that stage holds it."""

    stage: int
    position: int
    """Index in the stage's parameters."""
    mapping: Mapping
    shape: tuple[int, ...]
    dtype: torch.dtype


def hf_plan(chunks: Sequence[torch.nn.Module]) -> list[Part]:
    """Return every parameter of all stages, once, in the order of `hf_weights`; collective.

    The last stage's copy of tied embeddings is excluded.  The plan is valid as long as the model.
    """
    return _plan(stage_parameters(chunks))


@torch.no_grad()
def hf_weights(
    chunks: Sequence[torch.nn.Module], vocab_size: int, parts: Sequence[Part] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, full tensor) of every Hugging Face tensor, one Megatron parameter at a time.

    Collective: every rank must consume it to the end; all ranks get the same full tensors in the
    same order.  Each name occurs once; tied embeddings have no `lm_head`.  `parts`: the result of
    `hf_plan`, if it is known.
    """
    mine = stage_parameters(chunks)
    parts = _plan(mine) if parts is None else parts
    yield from _whole_tensors(chunks[0].config, mine, vocab_size, parts, adapters(chunks))


@torch.no_grad()
def hf_gradients(
    chunks: Sequence[torch.nn.Module], vocab_size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the gradients that Megatron's DDP has reduced, as `hf_weights` yields the weights.

    A gradient is split and joined like its weight, since mappings only move numbers.  With
    adapters, gradients are theirs, under the names of `adapter_weights`.
    """
    mine = [(name, mapping, p.main_grad) for name, mapping, p in trained_parameters(chunks)]
    yield from _whole_tensors(chunks[0].config, mine, vocab_size, _plan(mine))


def gradient_plan(chunks: Sequence[torch.nn.Module]) -> list[Part]:
    """Return the plan (`hf_plan`) of what `hf_gradients` yields; collective."""
    return _plan(trained_parameters(chunks))


@torch.no_grad()
def adapter_weights(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, full tensor) of the adapters' matrices; collective, see `hf_weights`.

    The name is that of the projection, with `lora_A` and `lora_B` before `weight`.  Projections
    without an adapter have no A, and a B of zeros if Megatron joins them with an adapted one.
    """
    mine = adapter_parameters(chunks)
    yield from _whole_tensors(chunks[0].config, mine, 0, _plan(mine))


def _whole_tensors(
    config: TransformerConfig,
    mine: Sequence[tuple[str, Mapping, torch.Tensor]],
    vocab_size: int,
    parts: Sequence[Part],
    adapted: dict[torch.Tensor, Adapter] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield full tensors under Hugging Face names; `mine` has (name, mapping, this rank's part).

    `adapted`: the adapters that are merged (`lora.adapters`).
    """
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    ep_group = parallel_state.get_expert_model_parallel_group()
    heads = attention_heads(config)
    for stage, position, mapping, shape, dtype in parts:
        if stage == pp_group.rank():
            part = mine[position][2]
            if adapted and part in adapted:
                part = adapted[part].merged(part)
            part = part.detach().contiguous()
        else:
            part = torch.empty(shape, dtype=dtype, device=mine[0][2].device)
        if pp_group.size() > 1:
            dist.broadcast(part, dist.get_global_rank(pp_group, stage), group=pp_group)
        split = [part] if mapping.split_dim is None else _gather(part, split_group(mapping))
        full = unshard(mapping, split)
        if mapping.expert is None:
            yield from zip(mapping.hf_names, to_hf(mapping, full, heads, vocab_size), strict=True)
            continue
        experts_per_rank = config.num_moe_experts // ep_group.size()
        for rank, other in enumerate(_gather(full, ep_group)):
            theirs = mapping.of_expert(mapping.expert % experts_per_rank + rank * experts_per_rank)
            yield from zip(theirs.hf_names, to_hf(theirs, other, heads, vocab_size), strict=True)


def hf_shapes(
    chunks: Sequence[torch.nn.Module], vocab_size: int, parts: Sequence[Part] | None = None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of what `hf_weights` yields, in its order; transfers no weights.

    Collective without the model's `hf_plan` in `parts`.
    """
    ep_size = parallel_state.get_expert_model_parallel_group().size()
    config, shapes = chunks[0].config, {}
    heads = attention_heads(config)
    for _, _, mapping, shape, dtype in hf_plan(chunks) if parts is None else parts:
        part = torch.empty(shape, dtype=dtype, device="meta")
        full = unshard(mapping, [part] * split_group(mapping).size())
        experts = [mapping]
        if mapping.expert is not None:
            experts_per_rank = config.num_moe_experts // ep_size
            local = mapping.expert % experts_per_rank
            experts = [mapping.of_expert(local + r * experts_per_rank) for r in range(ep_size)]
        for each in experts:
            for name, tensor in zip(
                each.hf_names, to_hf(each, full, heads, vocab_size), strict=True
            ):
                shapes[name] = (dtype, tuple(tensor.shape))
    return shapes


def save_hf(
    chunks: Sequence[torch.nn.Module],
    vocab_size: int,
    like: str | Path,
    directory: str | Path,
    *,
    write: bool = True,
) -> None:
    """Write a Megatron model as a Hugging Face directory; collective, one rank writes.

    `like`: the directory of the original model, whose configuration and tokenizer files are copied.
    """
    parts = hf_plan(chunks)
    shapes = hf_shapes(chunks, vocab_size, parts)
    writer = HFWriter(directory, shapes, like=like, kind="model") if write else None
    for name, tensor in hf_weights(chunks, vocab_size, parts):
        if writer:
            writer.write(name, tensor)
    if writer:
        writer.finish()


def _plan(mine: Sequence[tuple[str, Mapping, torch.Tensor]]) -> list[Part]:
    """Return the parts of all stages; `mine` has those of this rank's stage."""
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[Any] = [None] * pp_group.size()
    dist.all_gather_object(
        stages, [(mapping, tuple(p.shape), p.dtype) for _, mapping, p in mine], group=pp_group
    )
    seen: set[str] = set()
    parts = []
    for stage, theirs in enumerate(stages):
        for position, (mapping, shape, dtype) in enumerate(theirs):
            if not seen.issuperset(mapping.hf_names):
                seen.update(mapping.hf_names)
                parts.append(Part(stage, position, mapping, shape, dtype))
    return parts


def _gather(part: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    if group.size() == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
