"""LoRA (arXiv 2106.09685) on Megatron's linear layers, equal to that of `peft`.

A projection of the Hugging Face model has two trained matrices next to its frozen weight W:

    y = W x + (alpha / r) B A x        A [r, in], B [out, r]

Megatron joins projections in one weight (`mapping.py`), and its adapter has

    A [p r, in]     the matrices A of the p adapted projections, one above the other
    B [out, r]      the rows of all projections, in the order of the rows of W

so that row i of B is multiplied with that part of A x which belongs to the projection of row i.
Over tensor-parallel ranks,

| W is split by        | A             | B             | A x                                    |
|----------------------|---------------|---------------|----------------------------------------|
| rows (qkv, gate, up) | on every rank | split like W  | the same on every rank                 |
| columns (o, down)    | split like W  | on every rank | summed over the ranks, like the output |

Under sequence parallelism, A x has the tokens of all ranks in the first case and those of its rank
in the second, and the gradient of the matrix that every rank holds is summed over the ranks
(Megatron's mark `sequence_parallel`).
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_prepo import internals
from megatron_prepo.config import LoraConfig
from megatron_prepo.models.hf_to_megatron import attention_heads, split_group, stage_parameters
from megatron_prepo.models.mapping import (
    Heads,
    Mapping,
    adapter_mappings,
    shard,
    to_hf,
    to_megatron,
)


class Adapter(torch.nn.Module):
    """Adapter of one of Megatron's parallel linear layers, whose child `lora` it is."""

    def __init__(self, linear: Any, mapping: Mapping, heads: Heads, settings: LoraConfig) -> None:
        super().__init__()
        self.enabled, self.scale = True, settings.scale
        self.sequence_parallel: bool = linear.sequence_parallel
        self.by_columns, self.gated = mapping.kind == "row", mapping.kind == "gated"
        self.mappings = adapter_mappings(mapping, settings.target_modules)
        outputs, inputs = linear.weight.shape
        rows = len(self.mappings[0].hf_names) * settings.rank
        self.A = torch.nn.Parameter(linear.weight.new_zeros(rows, inputs))
        self.B = torch.nn.Parameter(linear.weight.new_zeros(outputs, settings.rank))
        whole, split, dim = (self.B, self.A, 1) if self.by_columns else (self.A, self.B, 0)
        whole.sequence_parallel = self.sequence_parallel
        set_tensor_model_parallel_attributes(split, True, dim, 1)
        owners = None
        if not self.by_columns:
            owners = _owners(mapping, self.mappings[0], heads, outputs).to(self.B)
        self.register_buffer("owners", owners, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (alpha / r) B A x, distributed over ranks like the layer's output."""
        low = F.linear(x, self.A)
        if self.by_columns and self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low)
        elif self.by_columns:
            low = reduce_from_tensor_model_parallel_region(low)
        elif self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
        else:
            low = copy_to_tensor_model_parallel_region(low)
        return F.linear(self.scale * low, self._rows())

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of W + (alpha / r) B A, computed in float32, in the type of W."""
        product = self._rows().float() @ self.A.float()
        return (weight.float() + self.scale * product).to(weight.dtype)

    def _rows(self) -> torch.Tensor:
        """Return B [out, p r], with zeros where a row meets the A of another projection."""
        if self.owners is None:
            return self.B
        return (self.owners[:, :, None] * self.B[:, None, :]).flatten(1)

    def sharded_state(self, prefix: str, offsets: Sequence[Any]) -> dict[str, Any]:
        """Return Megatron's sharded state; gate and up are separate tensors, as in the weight."""
        axes = {"A": 1} if self.by_columns else {"B": 0}
        state = self.state_dict(prefix="", keep_vars=True)
        entries: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, axes, offsets)
        if self.gated:
            entries[f"{prefix}B"] = apply_swiglu_sharded_factory(entries[f"{prefix}B"], offsets)
        return entries


def _owners(weight: Mapping, a: Mapping, heads: Heads, rows_here: int) -> torch.Tensor:
    """Return [out, p] for this rank's rows of W: 1 for the adapted projection of a row, else 0."""
    group = split_group(weight)
    num_rows = rows_here * group.size()
    owners = torch.zeros(num_rows, len(a.hf_names))
    rows = to_hf(weight, torch.arange(num_rows), heads, vocab_size=0)
    for name, rows_R in zip(weight.hf_names, rows, strict=True):
        a_name = name.replace(".weight", ".lora_A.weight")
        if a_name in a.hf_names:
            owners[rows_R, a.hf_names.index(a_name)] = 1.0
    here = torch.Size((rows_here, owners.shape[1]))
    return shard(weight, owners, here, group.rank(), group.size())


def add_adapters(stage: Any, settings: LoraConfig) -> None:
    """Freeze a model chunk (GPTModel), and add an adapter to each layer with a target, in place."""
    stage.requires_grad_(False)
    heads = attention_heads(stage.config)
    for name, mapping, _ in stage_parameters([stage]):
        if not adapter_mappings(mapping, settings.target_modules)[0].hf_names:
            continue
        linear = stage.get_submodule(name.removesuffix(".weight"))
        linear.lora = Adapter(linear, mapping, heads, settings)
        linear.register_forward_hook(_add_adapter)
        ours = MethodType(_sharded_state_dict, linear)
        internals.replace(linear, "sharded_state_dict", ours)
    if stage.pre_process:
        # recomputation drops the gradients of a layer none of whose inputs needs one
        stage.embedding.register_forward_hook(lambda _, __, hidden: hidden.requires_grad_())


def _add_adapter(
    linear: Any, inputs: tuple[torch.Tensor, ...], outputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Add the adapter's part to the output of a linear layer, which also returns its bias."""
    if not linear.lora.enabled:
        return outputs
    return (outputs[0] + linear.lora(inputs[0]), *outputs[1:])


def _sharded_state_dict(
    self: Any,
    /,
    prefix: str = "",
    sharded_offsets: Sequence[Any] = (),
    *args: Any,
    **kwargs: Any,
) -> dict[str, Any]:
    entries: dict[str, Any] = type(self).sharded_state_dict(
        self, prefix, sharded_offsets, *args, **kwargs
    )
    entries |= self.lora.sharded_state(f"{prefix}lora.", sharded_offsets)
    return entries


def adapters(chunks: Sequence[torch.nn.Module]) -> dict[torch.Tensor, Adapter]:
    """Return the adapter of each adapted weight of the (unwrapped) GPTModels."""
    return {
        linear.weight: linear.lora
        for chunk in chunks
        for linear in chunk.modules()
        if isinstance(linear._modules.get("lora"), Adapter)
    }


def adapter_parameters(
    chunks: Sequence[torch.nn.Module],
) -> list[tuple[str, Mapping, torch.nn.Parameter]]:
    """Return (Megatron's name, mapping, parameter) of the adapters, like `stage_parameters`."""
    return [
        (f"{name}.{matrix}", mapping, parameter)
        for chunk in chunks
        for name, adapter in chunk.named_modules()
        if isinstance(adapter, Adapter)
        for (matrix, parameter), mapping in zip(
            adapter.named_parameters(), adapter.mappings, strict=True
        )
    ]


def trained_parameters(
    chunks: Sequence[torch.nn.Module],
) -> list[tuple[str, Mapping, torch.nn.Parameter]]:
    """Return the parameters that are trained: those of the adapters, or all without adapters."""
    return adapter_parameters(chunks) or stage_parameters(chunks)


@contextmanager
def without_adapters(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Compute with the frozen weights alone."""
    found = adapters(chunks).values()
    for adapter in found:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.enabled = True


@torch.no_grad()
def initialize(chunks: Sequence[torch.nn.Module], seed: int) -> None:
    """Draw the matrices A of all adapters: the same numbers under every layout.

    As in `peft`, uniform within 1 over the root of the number of inputs (Kaiming with a leak of
    sqrt(5)), and B is zero.  Each matrix has a generator, seeded by `seed` and its name.
    """
    heads = attention_heads(chunks[0].config)
    for adapter in adapters(chunks).values():
        a, mapping = adapter.A, adapter.mappings[0]
        group, number = split_group(mapping), len(mapping.hf_names)
        shape = a.shape[0] // number, a.shape[1] * (group.size() if adapter.by_columns else 1)
        tensors = [initial_matrix(name, seed, shape) for name in mapping.hf_names]
        full = to_megatron(mapping, tensors, heads)
        a.copy_(shard(mapping, full, a.shape, group.rank(), group.size()))


def initial_matrix(name: str, seed: int, shape: tuple[int, int]) -> torch.Tensor:
    """Return the initial matrix A [r, in] of this name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    empty = torch.empty(shape, device="cpu")
    return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)
