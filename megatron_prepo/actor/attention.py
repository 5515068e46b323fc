"""Torch-native layer modules for Megatron's specs, for use without TransformerEngine.

Megatron's local norm does not support sequence parallelism and its local attention materialises the
scores; these two modules replace them, on any device.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from megatron_prepo import internals
from megatron_prepo.actor.context_parallel import heads_to_tokens, tokens_to_heads


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm in float32; its gradient is summed under sequence parallelism."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradients of parameters with this mark over tensor ranks
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of `x`, in the shape and type of `x`."""
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale).to(x.dtype) * self.weight


@dataclass
class RowLayout(PackedSeqParams):
    """Position of sequences in a row of T tokens; Megatron passes it through to every layer.

    Attention works on complete sequences: the sequences of the row in order, or, if some share a
    prefix of which the row has one copy, W tokens gathered from the row, with the prefix repeated
    per sequence.  For Megatron the row is an ordinary batch of one sequence (`qkv_format` stays
    empty): rotary angles are looked up by position, and the inherited fields describe the complete
    sequences.

    Under context parallelism this rank has a slice of the row, and attention works on the entire
    row for some of the heads (`context_parallel`).
    """

    positions_T: torch.Tensor | None = None
    """Position of each of this rank's tokens in its sequence."""
    lengths: tuple[int, ...] = ()
    """Lengths of the complete sequences, in order; the sum is W (T if no prefix is shared)."""
    whole_W: torch.Tensor | None = None
    """Index in the row of each token of the complete sequences; None: the row itself."""
    row_T: torch.Tensor | None = None
    """Index of each token of the row in the complete sequences."""
    context: dist.ProcessGroup | None = None
    """Ranks that hold the slices of the row, in order; None: this rank holds the entire row."""

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """Convert this rank's tokens [., heads, d] to complete sequences of this rank's heads."""
        x_T = x if self.context is None else tokens_to_heads(x, self.context)
        return x_T if self.whole_W is None else x_T.index_select(0, self.whole_W)

    def row(self, x_W: torch.Tensor) -> torch.Tensor:
        """Convert complete sequences [W, heads * d] of this rank's heads back to its tokens."""
        x_T = x_W if self.row_T is None else x_W.index_select(0, self.row_T)
        return x_T if self.context is None else heads_to_tokens(x_T, self.context)


class CausalAttention(MegatronModule):
    """Causal grouped-query attention: torch's variable-length kernel, or a loop over sequences.

    The kernel supports 16-bit types on CUDA.  On a CPU the loop is faster than padding, unless
    lengths are nearly equal (docs/packing.md).  A sliding window limits it to the latest tokens.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "context parallelism is set by RowLayout.context"
        assert config.attention_dropout == 0.0, "torch-native attention has no dropout"
        self.left: int = (config.window_size or (-1, 0))[0]
        """Number of earlier tokens that a token attends to; -1: all."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        packed_seq_params: RowLayout | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Attend: [s, b, heads, d] queries, [s, b, groups, d] keys and values to [s, b, heads * d].

        With a layout, b is 1 and tokens attend to earlier tokens of the same sequence; without one,
        each of the b sequences has length s.
        """
        if packed_seq_params is None:
            batch = (x.transpose(0, 1) for x in (query, key, value))
            return _attend(*batch, left=self.left).transpose(0, 1)
        layout = packed_seq_params
        query, key, value = (layout.whole(x.squeeze(1)) for x in (query, key, value))
        if query.is_cuda and query.element_size() == 2 and _has_kernel():
            out = _attend_in_one_kernel(query, key, value, layout, self.left)
        else:
            parts = zip(*(x.split(layout.lengths) for x in (query, key, value)), strict=True)
            outs = [_attend(*(x[None] for x in qkv), left=self.left)[0] for qkv in parts]
            out = torch.cat(outs) if len(outs) > 1 else outs[0]
        return layout.row(out)[:, None]


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, left: int
) -> torch.Tensor:
    """Attend: [b, s, heads, d] queries, and so on, to [b, s, heads * d]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    window = _window_mask(query.shape[2], left, query.device)
    if not _takes_groups(query, window):
        key, value = (_one_per_head(x, query.shape[1]) for x in (key, value))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=window,
        is_causal=window is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).flatten(2)


def _takes_groups(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return whether torch's best kernel takes fewer heads of keys and values than of queries.

    On CUDA the flash kernel does, which supports 16-bit types without a mask.  For anything else
    there is the memory-efficient one, which does not: given groups, torch silently falls back to
    products that keep the scores of all pairs of tokens, for each head.
    """
    return not query.is_cuda or (mask is None and query.element_size() == 2)


def _one_per_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat [b, groups, s, d] to [b, heads, s, d], each group for its heads, in order."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _window_mask(size: int, left: int, device: torch.device) -> torch.Tensor | None:
    """Return [s, s], whether a token attends to another; None if it does to all earlier ones.

    >>> _window_mask(3, 1, torch.device("cpu")).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    if left < 0 or size <= left + 1:
        return None
    return torch.ones(size, size, dtype=torch.bool, device=device).tril().triu(-left)


def _attend_in_one_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, left: int
) -> torch.Tensor:
    """Attend: [W, heads, d] queries, and so on, to [W, heads * d]."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        key,
        value,
        layout.cu_seqlens_q,
        layout.cu_seqlens_kv,
        layout.max_seqlen_q,
        layout.max_seqlen_kv,
        window_size=(left, 0),  # causal, within a sliding window unless it is -1
        **_grouped(varlen_attn, grouped=query.shape[1] != key.shape[1]),
    )
    return out.flatten(1)


@functools.cache
def _grouped(kernel: Callable[..., torch.Tensor], *, grouped: bool) -> dict[str, bool]:
    """Return the kernel's argument for grouped queries; torch 2.11 accepts them without one."""
    takes = "enable_gqa" in inspect.signature(kernel).parameters
    return {"enable_gqa": grouped} if takes else {}


@functools.cache
def _has_kernel() -> bool:
    """Return whether this torch has the kernel: torch 2.11 and later with a causal window."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters


def rotate_by_position(rotary: RotaryEmbedding) -> None:
    """Make the model's rotary embedding look up angles by a layout's positions, in place.

    Megatron first requests a length and then the angles of that length: with a layout, the layout
    is passed in place of the length.
    """
    internals.require(rotary, "get_emb")
    internals.replace(rotary, "get_rotary_seq_len", MethodType(_rotary_length, rotary))
    internals.replace(rotary, "forward", MethodType(_angles, rotary))


def _rotary_length(self: RotaryEmbedding, *args: Any, **kwargs: Any) -> RowLayout | int:
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, RowLayout):
            return argument
    length: int = type(self).get_rotary_seq_len(self, *args, **kwargs)
    return length


def _angles(
    self: RotaryEmbedding, length: int | RowLayout, /, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Return angles [T, 1, 1, d]."""
    if isinstance(length, RowLayout):
        # not by `forward`, which keeps the angles of 32 lengths, and selects this rank's slice
        return self.get_emb(length.max_seqlen_q)[length.positions_T]
    return type(self).forward(self, length, *args, **kwargs)


def padding_multiple(config: TransformerConfig) -> int:
    """Return the number that must divide row lengths.

    Context parallelism splits a row evenly, and sequence parallelism each slice of it.
    """
    multiple: int = parallel_state.get_context_parallel_world_size()
    if config.sequence_parallel:
        multiple *= parallel_state.get_tensor_model_parallel_world_size()
    return multiple
