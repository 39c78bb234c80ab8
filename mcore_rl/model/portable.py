"""RMSNorm and attention in plain torch, used where Transformer Engine is absent.

Megatron-Core's own local modules have no packed sequences (THD), refuse context parallelism and refuse
sequence parallelism in the norm. These two do all three, so that the same layer stack runs on a laptop.

Legend: T packed tokens of this rank, B sequences, L longest of them, N query heads and K key/value heads of
this tensor-parallel rank, D channels per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcore_rl.model.again import ThriftyColumn, ThriftyRow, noted
from mcore_rl.model.packed_layout import PackedLayout, Places
from mcore_rl.parallel.context import gather_keys_values

ROWS = 512
"""queries of a sequence whose scores are there at once, where attention is plain matrix products"""


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), in float32 or wider, marked for sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused) -> None:
        super().__init__()
        self.eps, self.centered = eps, config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums such a weight's gradient over tensor-parallel ranks: each saw part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]; scaled as transformers does: in x's precision after the norm.

        A weight that is stored less 1 (Gemma) is scaled with before the rounding.
        """
        if self.centered:
            return noted(_centered_norm(x, self.weight, self.eps), _centered_norm, x, self.weight, self.eps)
        answer = cast(Tensor, _ScaledNorm.apply(x, self.weight, self.eps))
        return noted(answer, _scaled_norm, x, self.weight, self.eps)


def _centered_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    normed = F.rms_norm(wide, wide.shape[-1:], eps=eps)
    return (normed * (1 + weight.to(wide.dtype))).to(x.dtype)


def _scaled_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide, inverse = _wide_and_inverse(x, eps)
    return weight * (wide * inverse).to(x.dtype)


def _wide_and_inverse(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x in float32 or wider, and 1 / rms of each token."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide, (wide.square().mean(-1, keepdim=True) + eps).rsqrt_()


class _ScaledNorm(torch.autograd.Function):
    """weight * x / rms(x). It keeps x and a number a token, where autograd would keep x and two products."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide, inverse = _wide_and_inverse(x, eps)
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

    With a window, a query sees the last tokens only. Scores can be capped before the softmax (Gemma 2, arXiv
    2408.00118 section 2), and a query can attend to a sink, one learnt score a head without a value (gpt-oss,
    arXiv 2508.10925 section 2.3): no kernel of torch has these two, so that they are plain matrix products.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cap: float | None = None,
        **_unused,
    ) -> None:
        """`cap`: scores s become cap tanh(s / cap); None for scores as they are."""
        super().__init__()
        self.softmax_scale, self.cap = softmax_scale, cap
        which: Any = config.window_attn_skip_freq
        windowed = is_layer_window_attention(config.window_size, which, layer_number)
        self.window = config.window_size[0] + 1 if windowed and config.window_size else None
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.register_parameter("softmax_offset", None)
        if config.softmax_type == "learnable":
            self.softmax_offset = nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))

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
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        padding, queries = layout.padding, layout.padding.queries
        keys = padding.keys
        if layout.keys is not None:
            k, v = gather_keys_values(k, v)
            keys = Places.of([layout.keys.to_padded])
        parts = zip(queries.padded(q), keys.padded(k), keys.padded(v), strict=True)
        outs = [self._of_part(*of_part, layout) for of_part in parts]
        return noted(_unpad(padding.from_padded, *outs), _unpad, padding.from_padded, *outs)

    def _of_part(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        """q [B, L, N, D], k and v [B, S, K, D] of sequences that are padded together -> [B, N, L, D]."""
        seen = (..., slice(q.shape[1]), slice(k.shape[1]))
        if self.cap is not None or self.softmax_offset is not None:
            return self._attend_by_scores(q, k, v, layout.visible(self.window)[seen])
        if layout.keys is None and self.window is None:
            return self._attend(q, k, v, is_causal=True)
        return self._attend(q, k, v, attn_mask=layout.mask(self.window, q.dtype)[seen])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        width = v.shape[-1]
        if width < k.shape[-1]:  # with unequal widths torch would keep the whole matrix of weights
            v = F.pad(v, (0, k.shape[-1] - width))
        out = F.scaled_dot_product_attention(
            q, k, v, scale=self.softmax_scale, enable_gqa=k.shape[1] != q.shape[1], **mask
        )
        return out[..., :width]

    def _attend_by_scores(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """q [B, L, N, D], k and v [B, S, K, D], visible [B or 1, 1, L, S] -> [B, N, L, D]."""
        scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        per_key = q.shape[2] // k.shape[2]
        q = q.transpose(1, 2)
        k, v = (x.transpose(1, 2).repeat_interleave(per_key, dim=1) for x in (k, v))
        if q.shape[2] <= ROWS:
            return self._block(q, k, v, visible, scale)
        # The scores of some queries at a time, which the backward pass computes again: all of them at once
        # would be heads x L^2 numbers, several times.
        blocks = zip(q.split(ROWS, 2), visible.split(ROWS, 2), strict=True)
        attend: Any = partial(checkpoint, self._block, use_reentrant=False)
        return torch.cat([attend(some, k, v, seen, scale) for some, seen in blocks], 2)

    def _block(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
        """q [B, N, l, D], k and v [B, N, S, D], visible [B or 1, 1, l, S] -> [B, N, l, D]."""
        scores = q @ k.transpose(2, 3)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        scores = scores.masked_fill(~visible, -torch.inf)
        if self.softmax_offset is None:
            return scores.softmax(-1).to(v.dtype) @ v
        sinks = self.softmax_offset.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1].to(v.dtype) @ v

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        """Describe the sinks as Megatron's modules do: the heads of a rank are a shard."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=cast(Any, parallel_state.get_tensor_model_parallel_group()),
            dp_cp_group=metadata["dp_cp_group"],
        )


def _unpad(index: Tensor, *outs: Tensor) -> Tensor:
    """[B, N, L, D] of every part -> [T, 1, N * D]"""
    flat = [out.transpose(1, 2).flatten(0, 1) for out in outs]
    whole = flat[0] if len(flat) == 1 else torch.cat(flat)
    return whole.index_select(0, index).flatten(1).unsqueeze(1)


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
    grouped_column: Any = None
    """the column-parallel layers of all experts of a rank as one; None where each is a layer of its own"""
    grouped_row: Any = None


PORTABLE = Parts(RMSNorm, PackedAttention, ThriftyColumn, ThriftyRow, ReplicatedLinear, norm_column=None)
"""run anywhere, in float32, float64 or bf16"""
