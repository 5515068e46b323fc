"""TransformerEngine's attention on rows of sequences; imported only if it is installed."""

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig

from megatron_prepo.actor.attention import RowLayout
from megatron_prepo.actor.context_parallel import heads_of_a_rank


class PackedTEAttention(TEDotProductAttention):
    """Attention on rows by TransformerEngine's `thd` kernels, used like `CausalAttention`."""

    def __init__(self, config: TransformerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(_with_local_heads(config), *arguments, **options)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: RowLayout | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Attend: [t, 1, heads, d] queries, [t, 1, groups, d] keys, values to [t, 1, heads * d]."""
        if packed_seq_params is None:
            out: torch.Tensor = super().forward(query, key, value, attention_mask, **options)
            return out
        layout = packed_seq_params
        out = super().forward(
            *(layout.whole(x.squeeze(1)) for x in (query, key, value)),
            attention_mask,
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=layout.cu_seqlens_q,
                cu_seqlens_kv=layout.cu_seqlens_kv,
                max_seqlen_q=layout.max_seqlen_q,
                max_seqlen_kv=layout.max_seqlen_kv,
            ),
            **options,
        )
        return layout.row(out.flatten(1))[:, None]


def _with_local_heads(config: TransformerConfig) -> TransformerConfig:
    """Return a configuration with this rank's number of heads, which TransformerEngine checks."""
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks <= 1:
        return config
    tensor = config.tensor_model_parallel_size
    config = copy.copy(config)
    config.num_attention_heads //= ranks
    config.num_query_groups = tensor * heads_of_a_rank(config.num_query_groups // tensor, ranks)
    return config
