"""Latent attention on Megatron's: its modules and forward pass, with packed sequences and exact gradients.

Megatron-Core's own assembly of queries and keys turns by one sequence's positions, has the portable latents
cut over the ranks and gathers every token's hidden state for them, and takes the epsilon of the other norms
for those of the latents. Here it is written out; everything behind it is Megatron's. Tensor parallelism comes
with sequence parallelism, as every family that has latent attention is a mixture of experts.

Legend: T local packed tokens, S = T / TP of them on this tensor-parallel rank, N heads of this rank, D
channels of a query, V of a value.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.model.hf.latent import NORM_EPS
from mcore_rl.model.hf.rope import Yarn
from mcore_rl.model.packed_layout import PackedLayout
from mcore_rl.model.portable import Parts
from mcore_rl.model.rotary import turn

CHECKPOINT_NAMES = {
    f"self_attention.{name}_layernorm.": f"self_attention.linear_{name}_up_proj.layer_norm_"
    for name in ("q", "kv")
}
"""names in Megatron's distributed checkpoints: those of Transformer Engine's fused modules, in either spec"""


def latent_settings(arch: Architecture) -> dict[str, Any]:
    """The arguments of Megatron's MLATransformerConfig that TransformerConfig does not have."""
    latent, scaling = arch.latent, arch.rotary.scaling
    if latent is None:
        return {}
    stretched = isinstance(scaling, Yarn)
    return {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.rank,
        "qk_head_dim": latent.plain,
        "qk_pos_emb_head_dim": latent.turned,
        "v_head_dim": latent.value,
        "rope_type": "rope",  # its table is not used: positions are those of packed sequences
        # Of these two Megatron makes the softmax scale; the frequencies are ours.
        "rotary_scaling_factor": scaling.factor if stretched else 1.0,
        "mscale_all_dim": scaling.strength if stretched else 0.0,
    }


def latent_attention(arch: Architecture, parts: Parts) -> ModuleSpec:
    """The attention of a layer."""
    return ModuleSpec(
        module=LatentAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "parts": parts,
            "interleaved": arch.rotary.interleaved,
            "rotation_scale": arch.rotary.scale,
        },
        submodules=MLASelfAttentionSubmodules(
            core_attention=parts.attention,
            linear_proj=parts.row,
            q_layernorm=IdentityOp,
            kv_layernorm=IdentityOp,
        ),
    )


class LatentAttention(MLASelfAttention):
    """Megatron's latent attention with the latents whole on every tensor-parallel rank.

    A rank computes the latents of its own tokens; what is made of them is cut by heads. So the narrow latents
    are what ranks exchange.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any,
        layer_number: int,
        *,
        parts: Parts,
        interleaved: bool,
        rotation_scale: float,
        **kwargs: Any,
    ) -> None:
        """Take what MLASelfAttention takes, whose base class builds the attention and the output layer."""
        super(MLASelfAttention, self).__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attention_type="self",
            **kwargs,
        )
        self.rotary_pos_emb = None
        self.interleaved, self.rotation_scale = interleaved, rotation_scale
        queries = config.num_attention_heads * self.q_head_dim
        if config.q_lora_rank is None:
            self.linear_q_proj = self._cut(parts, config.hidden_size, queries)
        else:
            self.linear_q_down_proj = self._whole(parts, config.hidden_size, config.q_lora_rank)
            self.q_layernorm = parts.norm(config=config, hidden_size=config.q_lora_rank, eps=NORM_EPS)
            self.linear_q_up_proj = self._cut(parts, config.q_lora_rank, queries)
        latent_and_key = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = self._whole(parts, config.hidden_size, latent_and_key)
        self.kv_layernorm = parts.norm(config=config, hidden_size=config.kv_lora_rank, eps=NORM_EPS)
        keys_values = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
        self.linear_kv_up_proj = self._cut(parts, config.kv_lora_rank, keys_values)

    def _cut(self, parts: Parts, inputs: int, outputs: int) -> Any:
        return parts.column(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )

    def _whole(self, parts: Parts, inputs: int, outputs: int) -> Any:
        return parts.replicated(
            inputs,
            outputs,
            parallel_mode="duplicated",
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            skip_bias_add=False,
            skip_weight_param_allocation=False,
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedLayout,
        **kwargs: Any,
    ) -> Any:
        """Run as Megatron's, which takes no angles: they go with the layout to where they are used."""
        layout = replace(packed_seq_params, angles=rotary_pos_emb)
        return super().forward(hidden_states, attention_mask, packed_seq_params=layout, **kwargs)

    def get_query_key_value_tensors(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        key_value_states: None = None,
        position_ids: None = None,
        packed_seq_params: PackedLayout | None = None,
        **_unused: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """hidden [S, 1, H] -> query and key [T, 1, N, D], value [T, 1, N, V], both latents [S, 1, ...]."""
        config: Any = self.config
        angles: Any = packed_seq_params and packed_seq_params.angles
        source = hidden_states
        if config.q_lora_rank is None:
            query, _ = self.linear_q_proj(source)
        else:
            source = self.q_layernorm(self.linear_q_down_proj(hidden_states)[0])
            query, _ = self.linear_q_up_proj(source)
        latent, turned_key = self.linear_kv_down_proj(hidden_states)[0].split(
            [config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1
        )
        latent = self.kv_layernorm(latent)
        keys_values, _ = self.linear_kv_up_proj(latent)
        heads = self.num_attention_heads_per_partition
        query, keys_values = (x.view(*x.shape[:2], heads, -1) for x in (query, keys_values))
        plain_query, turned_query = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        plain_key, value = keys_values.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        # Back, what the heads of every rank say of the key is summed.
        turned_key = gather_from_sequence_parallel_region(turned_key, group=self.pg_collection.tp)[:, :, None]
        turned_query, turned_key = (
            turn(x, angles, interleaved=self.interleaved, scale=self.rotation_scale)
            for x in (turned_query, turned_key)
        )
        query = torch.cat([plain_query, turned_query], dim=-1)
        key = torch.cat([plain_key, turned_key.expand(-1, -1, heads, -1)], dim=-1)
        return query, key, value, source, latent
