"""Torch-native layer parts for Megatron's specs, where TransformerEngine is not installed.

Megatron's local norm refuses sequence parallelism and its local attention materialises scores;
these two take their places, on any device.
"""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm in float32; its gradient is summed under sequence parallelism."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradients of parameters so marked over tensor parallelism
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and type as `x`."""
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale).to(x.dtype) * self.weight


class CausalAttention(MegatronModule):
    """Causal grouped-query attention by `scaled_dot_product_attention`.

    Sequences of a batch are padded on the right, which a causal mask never looks at.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **_):
        super().__init__(config=config)
        assert config.context_parallel_size == 1, (
            "torch-native attention has no context parallelism"
        )
        assert config.attention_dropout == 0.0, "torch-native attention has no dropout"

    def forward(
        self,
        query,
        key,
        value,
        attention_mask=None,
        attn_mask_type=None,
        packed_seq_params=None,
        **_,
    ):
        """[s, b, heads, d] queries and [s, b, groups, d] keys and values to [s, b, heads * d]."""
        assert packed_seq_params is None, "torch-native attention takes padded sequences"
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2).contiguous()


def padding_multiple(config) -> int:
    """Sequence lengths must be a multiple of this: sequence parallelism splits them evenly."""
    if config.sequence_parallel:
        return parallel_state.get_tensor_model_parallel_world_size()
    return 1
