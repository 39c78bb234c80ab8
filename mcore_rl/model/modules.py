"""What some families have in a layer and Megatron-Core has not, as modules that its layers are built of.

Legend: T local packed tokens, N query or key heads of this tensor-parallel rank, D channels a head, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class WholeNorm(nn.Module):
    """RMSNorm of all heads' channels together (OLMo 2), cut over the tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, channels: int) -> None:
        """`channels`: of all heads of all ranks."""
        super().__init__()
        self.channels, self.ranks = channels, config.tensor_model_parallel_size
        self.eps = config.layernorm_epsilon
        self.weight = nn.Parameter(torch.ones(channels // self.ranks, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[T, 1, N, D] -> the same; in float32 or wider."""
        wide = (x if x.dtype == torch.float64 else x.float()).flatten(-2)
        squares = wide.square().sum(-1, keepdim=True)
        if self.ranks > 1:
            # Every rank's outputs depend on the sum: its gradient is summed over the ranks as well.
            squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        normed = wide * torch.rsqrt(squares / self.channels + self.eps)
        return (self.weight * normed).to(x.dtype).view(x.shape)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        """Describe the shard as Megatron's modules do."""
        group: Any = parallel_state.get_tensor_model_parallel_group()
        weights = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            weights,
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class ResidualAdd(nn.Module):
    """Adds what attention or the MLP answers with to the residual stream, normalized or scaled before.

    Stands where Megatron has a function that adds bias and residual; there is no dropout.
    """

    def __init__(self, config: TransformerConfig, norm: Any | None, scale: float) -> None:
        """`norm`: class of the norm, None for none; `scale`: what is added is multiplied by it."""
        super().__init__()
        self.norm = norm and norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.scale = scale

    def forward(self, training: bool, fused: bool) -> Callable[[Any, Tensor, float], Tensor]:
        """Answer with the function, as Megatron asks for it in every pass."""
        return self._add

    def _add(self, answer: Any, residual: Tensor, dropout: float) -> Tensor:
        """(output [T or T/tp, 1, H], bias [H] or None), residual of the same shape -> their sum."""
        output, bias = answer
        if bias is not None:
            output = output + bias
        if self.norm is not None:
            output = self.norm(output)
        return residual + (output if self.scale == 1.0 else output * self.scale)


@cache
def biased(linear: Any) -> Any:
    """The linear layer `linear` with a bias, whatever Megatron asks for: it has one flag for all of them."""

    class Biased(linear):
        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=True, **kwargs)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, bias = super().forward(*args, **kwargs)
            # Megatron adds the bias of an expert in place, which autograd forbids for what a collective over
            # one rank answers with: its input itself.
            in_place = getattr(self, "is_expert", False) and output._is_view()
            return output.clone() if in_place else output, bias

    Biased.__name__ = Biased.__qualname__ = f"Biased{linear.__name__}"
    return Biased


@dataclass(frozen=True)
class LayerRotation:
    """How a layer turns its queries and keys, beyond what Megatron's rotary embedding does."""

    channels: int
    """of a head that are turned, its first ones"""
    scale: float
    """they are multiplied by it"""
    table: int | None
    """which of the rotary tables that come with the tokens; None where there is one"""


class ExtendedAttention(SelfAttention):
    """Attention with norms of all heads together, or with a rotary embedding of its own.

    Megatron sums the gradients of what it calls q_layernorm and k_layernorm over the tensor-parallel ranks:
    right for a norm of every head, of which all ranks have a copy, and wrong for the shards of these.
    """

    def __init__(self, *args: Any, whole_norm: bool, turn: LayerRotation, **kwargs: Any) -> None:
        """Take what SelfAttention takes."""
        super().__init__(*args, **kwargs)
        factors = torch.ones(self.hidden_size_per_attention_head)
        factors[: turn.channels] = turn.scale
        self.turn = turn
        self.rotation_scale: Tensor
        self.register_buffer("rotation_scale", factors, persistent=False)
        widths = (self.query_projection_size, self.kv_projection_size)
        self.query_norm, self.key_norm = (
            WholeNorm(self.config, width) if whole_norm else nn.Identity() for width in widths
        )

    def forward(self, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        """Attend as SelfAttention does; several rotary tables come as one tensor, one after the other."""
        if rotary_pos_emb is not None and self.turn.table is not None:
            rotary_pos_emb = rotary_pos_emb[self.turn.table]
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Query and key are multiplied before they are turned, which is the same as after it."""
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        query, key = self.query_norm(query), self.key_norm(key)
        if self.turn.scale != 1.0:
            factors = self.rotation_scale.to(query.dtype)
            query, key = query * factors, key * factors
        return query, key, *rest
