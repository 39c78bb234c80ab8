"""RMSNorm and attention in plain torch, used where Transformer Engine is absent.

Megatron-Core's own local modules have no packed sequences (THD), refuse context parallelism and refuse
sequence parallelism in the norm. These two do all three, so that the same layer stack runs on a laptop.

Legend: T packed tokens of this rank, B sequences, L longest of them, N query heads and K key/value heads of
this tensor-parallel rank, D channels per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mcore_rl.parallel.context import gather_keys_values, gathered_places


@dataclass(kw_only=True)
class PackedLayout(PackedSeqParams):
    """How the packed tokens of one micro-batch lie.

    `qkv_format` is "sbhd" on purpose: rotary embeddings are indexed by `position_ids` (one gather) instead of
    Megatron's loop over sequences, and both attentions read the boundaries themselves. What only the portable
    one reads is made when its first layer asks, on the device, and goes with the micro-batch.
    """

    position_ids: Tensor
    """[T] position of every local token in its own sequence"""
    padding: Padding
    """of the local tokens"""
    boundaries: Tensor
    """[B+1] int32 boundaries of the whole sequences, all context-parallel shares together"""
    keys: KeyLayout | None = None
    """set under context parallelism, where keys come from all ranks of the group"""
    experts: Tensor | None = None
    """[T, or T / TP under sequence parallelism, layers, K] that tokens are sent to; see model.routing"""

    @classmethod
    def of(
        cls,
        position_ids: Tensor,
        boundaries: Tensor,
        longest: int,
        *,
        context: int = 1,
        experts: Tensor | None = None,
    ) -> PackedLayout:
        """From the local tokens' positions [T]; no tensor is read here, so that a GPU need not be waited for.

        Args:
            boundaries: [B+1] of the whole sequences.
            longest: tokens of the longest of them.
            context: ranks that hold a share of each.
        """
        tokens = len(position_ids)
        whole = Padding(boundaries, longest, tokens * context)
        local = whole if context == 1 else Padding(boundaries // context, longest // context, tokens)
        return cls(
            qkv_format="sbhd",
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            position_ids=position_ids,
            padding=local,
            boundaries=boundaries,
            keys=None if context == 1 else KeyLayout(whole, local, position_ids, context),
            experts=experts,
        )


@dataclass
class Padding:
    """From packed tokens to [B, L] and back."""

    boundaries: Tensor
    """[B+1]"""
    longest: int
    """L"""
    tokens: int
    """T"""

    @cached_property
    def to_padded(self) -> Tensor:
        """[B, L] index into the tokens; T (one past the end) where a sequence is shorter."""
        starts, ends = self.boundaries[:-1, None].long(), self.boundaries[1:, None].long()
        index = starts + torch.arange(self.longest, device=starts.device)
        return torch.where(index < ends, index, self.tokens)

    @cached_property
    def from_padded(self) -> Tensor:
        """[T] index into the flattened [B * L]."""
        boundaries = self.boundaries.long()
        token = torch.arange(self.tokens, device=boundaries.device)
        sequence = torch.bucketize(token, boundaries[1:], right=True)
        return sequence * self.longest + token - boundaries[sequence]


@dataclass
class KeyLayout:
    """Where the keys and values of whole sequences lie after the context-parallel all-gather."""

    whole: Padding
    local: Padding
    position_ids: Tensor
    """[T] of this rank's tokens"""
    size: int
    """ranks of the group"""
    kept: Tensor | None = None
    """what `mask` has made"""

    @cached_property
    def to_padded(self) -> Tensor:
        """[B, L_whole] index into the gathered tokens, in sequence order; their number where padded."""
        place = gathered_places(self.whole.boundaries, self.size, self.whole.tokens)
        return F.pad(place, (0, 1), value=self.whole.tokens)[self.whole.to_padded]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, L_local, L_whole] 0 where the query may see the key, else -inf; of all layers the same one.

        It is what torch makes of a mask of bools in every layer anew, to keep it until the backward pass.
        """
        if self.kept is None or self.kept.dtype != dtype:
            # padding sees everything: it is never read
            positions = F.pad(self.position_ids, (0, 1), value=self.whole.longest)[self.local.to_padded]
            hidden = positions[:, None, :, None] < torch.arange(self.whole.longest, device=positions.device)
            self.kept = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.kept.masked_fill_(hidden, -torch.inf)
        return self.kept


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
        return cast(Tensor, _ScaledNorm.apply(x, self.weight, self.eps))


class _ScaledNorm(torch.autograd.Function):
    """weight * x / rms(x). It keeps x and a number a token, where autograd would keep x and two products."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = ctx.saved_tensors
        normal = x.to(inverse.dtype) * inverse
        weight_grad = (grad * normal.to(x.dtype)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        scaled = (grad * weight).to(inverse.dtype)
        scaled = scaled - normal * (scaled * normal).mean(-1, keepdim=True)
        return (scaled * inverse).to(x.dtype), weight_grad, None


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
        """query [T, 1, N, D], key and value [T, 1, K, D] -> [T, 1, N * D]."""
        layout = packed_seq_params
        to_padded = layout.padding.to_padded
        q = _pad(query.squeeze(1), to_padded)
        if layout.keys is None:
            k, v = (_pad(x.squeeze(1), to_padded) for x in (key, value))
            out = self._attend(q, k, v, is_causal=True)
        else:
            k, v = (
                _pad(x, layout.keys.to_padded) for x in gather_keys_values(key.squeeze(1), value.squeeze(1))
            )
            out = self._attend(q, k, v, attn_mask=layout.keys.mask(q.dtype))
        flat = out.transpose(1, 2).flatten(0, 1).index_select(0, layout.padding.from_padded)
        return flat.flatten(1).unsqueeze(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, scale=self.softmax_scale, enable_gqa=k.shape[1] != q.shape[1], **mask
        )


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
    norm_column: Any | None
    """one joined with the norm before it; None where they are apart"""


PORTABLE = Parts(RMSNorm, PackedAttention, ColumnParallelLinear, RowParallelLinear, None)
"""run anywhere, in float32, float64 or bf16"""
