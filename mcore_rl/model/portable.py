"""RMSNorm and attention in plain torch, used where Transformer Engine is absent.

Megatron-Core's own local modules have no packed sequences (THD), refuse context parallelism and refuse
sequence parallelism in the norm. These two do all three, so that the same layer stack runs on a laptop.

Legend: T packed tokens of this rank, B sequences, L longest of them, N query heads and K key/value heads of
this tensor-parallel rank, D channels per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mcore_rl.parallel.context import gather_keys_values


@dataclass(kw_only=True)
class PackedLayout(PackedSeqParams):
    """How the packed tokens of one micro-batch lie; computed once, used by every layer.

    `qkv_format` is "sbhd" on purpose: rotary embeddings are indexed by `position_ids` (one gather) instead of
    Megatron's loop over sequences, and this attention reads the boundaries itself.
    """

    position_ids: Tensor
    """[T] position of every local token in its own sequence"""
    to_padded: Tensor
    """[B, L] index into the local tokens; T (one past the end) where a sequence is shorter"""
    from_padded: Tensor
    """[T] index into the flattened [B * L]"""
    boundaries: Tensor
    """[B+1] int32 boundaries of the whole sequences, all context-parallel shares together"""
    keys: KeyLayout | None = None
    """set under context parallelism, where keys come from all ranks of the group"""
    experts: Tensor | None = None
    """[T, or T / TP under sequence parallelism, layers, K] that tokens are sent to; see model.routing"""
    live: Tensor | None = None
    """[T, or T / TP under sequence parallelism] bool: False for padding; None where there is none"""
    angles: Tensor | None = None
    """[T, 1, 1, channels] that latent attention turns by; every layer sets it for itself"""

    @classmethod
    def of(
        cls,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        keys: KeyLayout | None = None,
        boundaries: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> PackedLayout:
        """From the local tokens' positions [T] and boundaries [B+1]; `boundaries` where CP is not 1."""
        to_padded, from_padded, longest = _padding_index(cu_seqlens.to(torch.int64))
        whole = longest if keys is None else keys.longest
        return cls(
            qkv_format="sbhd",
            max_seqlen_q=whole,
            max_seqlen_kv=whole,
            position_ids=position_ids,
            to_padded=to_padded,
            from_padded=from_padded,
            boundaries=cu_seqlens if boundaries is None else boundaries,
            keys=keys,
            experts=experts,
        )


@dataclass
class KeyLayout:
    """Where the keys and values of whole sequences lie after the context-parallel all-gather."""

    to_padded: Tensor
    """[B, L_whole] index into the gathered tokens, in sequence order; their number where padded"""
    mask: Tensor
    """[B, 1, L_local, L_whole] True where the query may see the key"""
    longest: int
    """L_whole"""


def _padding_index(cu_seqlens: Tensor) -> tuple[Tensor, Tensor, int]:
    """[B+1] boundaries -> ([B, L] gather index, [T] scatter index, L)."""
    lengths = cu_seqlens.diff()
    total, longest = int(cu_seqlens[-1]), int(lengths.max())
    slots = torch.arange(longest, device=cu_seqlens.device)
    inside = slots < lengths[:, None]
    to_padded = torch.where(inside, cu_seqlens[:-1, None] + slots, total)
    return to_padded, inside.flatten().nonzero().squeeze(1), longest


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), in float32 or wider, marked for sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums such a weight's gradient over tensor-parallel ranks: each saw part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]; scaled in x's precision after the norm, as transformers does."""
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)


class ReplicatedLinear(nn.Module):
    """A linear layer that every tensor-parallel rank has whole, without bias."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **_unused: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        # As for a norm: each rank saw part of the tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., input] -> [..., output], and no bias, as Megatron's layers answer."""
        return F.linear(x, self.weight), None


class PackedAttention(nn.Module):
    """Causal grouped-query attention over packed sequences: pad to [B, L], torch's fused kernel, unpad.

    Padding at the end of a sequence is harmless: a causal query never sees what follows it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_unused,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask=None,
        *,
        packed_seq_params: PackedLayout,
        **_unused,
    ) -> Tensor:
        """query [T, 1, N, D], key and value [T, 1, K, D] -> [T, 1, N * D], D that of the values."""
        layout = packed_seq_params
        q = _pad(query.squeeze(1), layout.to_padded)
        if layout.keys is None:
            k, v = (_pad(x.squeeze(1), layout.to_padded) for x in (key, value))
            out = self._attend(q, k, v, is_causal=True)
        else:
            k, v = (
                _pad(x, layout.keys.to_padded) for x in gather_keys_values(key.squeeze(1), value.squeeze(1))
            )
            out = self._attend(q, k, v, attn_mask=layout.keys.mask)
        flat = out.transpose(1, 2).flatten(0, 1).index_select(0, layout.from_padded)
        return flat.flatten(1).unsqueeze(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        width = v.shape[-1]
        if width < k.shape[-1]:  # with unequal widths torch would keep the whole matrix of weights
            v = F.pad(v, (0, k.shape[-1] - width))
        out = F.scaled_dot_product_attention(
            q, k, v, scale=self.softmax_scale, enable_gqa=k.shape[1] != q.shape[1], **mask
        )
        return out[..., :width]


def _pad(x: Tensor, index: Tensor) -> Tensor:
    """[T, heads, D] -> [B, L, heads, D]; the index T reads a row of zeros."""
    return F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


@dataclass(frozen=True)
class Parts:
    """The classes that a layer is built of."""

    norm: Any
    attention: Any
    column: Any
    """column-parallel linear layer"""
    row: Any
    replicated: Any
    """linear layer that every tensor-parallel rank has whole"""
    norm_column: Any | None
    """one joined with the norm before it; None where they are apart"""


PORTABLE = Parts(
    RMSNorm, PackedAttention, ColumnParallelLinear, RowParallelLinear, ReplicatedLinear, norm_column=None
)
"""run anywhere, in float32, float64 or bf16"""
