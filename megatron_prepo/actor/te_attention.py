"""TransformerEngine's attention on rows of sequences; imported only where it is installed."""

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_prepo.actor.attention import RowLayout


class PackedTEAttention(TEDotProductAttention):
    """`CausalAttention`'s contract for rows, by TransformerEngine's kernels for `thd`."""

    def forward(
        self,
        query,
        key,
        value,
        attention_mask=None,
        *,
        packed_seq_params: RowLayout | None = None,
        **options,
    ):
        """[t, 1, heads, d] queries, [t, 1, groups, d] keys and values to [t, 1, heads * d]."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, **options)
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
