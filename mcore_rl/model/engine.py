"""Transformer Engine's modules as a layer's parts. Importing this module needs Transformer Engine."""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TELinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mcore_rl.model.packed_layout import PackedLayout
from mcore_rl.model.portable import Parts


class PackedEngineAttention(TEDotProductAttention):
    """Transformer Engine's attention on packed sequences (THD); context parallelism by its ring of keys.

    The layout calls itself "sbhd", so that Megatron rotates by position id instead of by boundaries; only
    here it becomes THD. Under context parallelism, rank r has chunks r and 2 x CP - 1 - r of every sequence,
    in the order that Transformer Engine expects.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask=None,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        *,
        packed_seq_params: PackedLayout,
        **_unused,
    ) -> Tensor:
        """query [T, 1, N, D], key and value [T, 1, K, D] -> [T, 1, N * D]."""
        layout = packed_seq_params
        assert not layout.shares_prompts, "Transformer Engine's attention takes whole sequences"
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=layout.boundaries,
            cu_seqlens_kv=layout.boundaries,
            max_seqlen_q=layout.max_seqlen_q,
            max_seqlen_kv=layout.max_seqlen_kv,
        )
        out = super().forward(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            None,
            attn_mask_type=attn_mask_type,
            packed_seq_params=packed,
        )
        return out.reshape(query.shape[0], 1, -1)


PARTS = Parts(
    norm=TENorm,
    attention=PackedEngineAttention,
    column=TEColumnParallelLinear,
    row=TERowParallelLinear,
    replicated=TELinear,
    norm_column=TELayerNormColumnParallelLinear,
    grouped_column=TEColumnParallelGroupedLinear,
    grouped_row=TERowParallelGroupedLinear,
)
