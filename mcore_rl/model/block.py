"""The layers of a pipeline stage: Megatron's, built of Transformer Engine's modules or of portable ones."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from mcore_rl.model import versions
from mcore_rl.model.portable import PORTABLE, Parts
from mcore_rl.model.precision import check_fp8, takes_transformer_engine
from mcore_rl.model.routing import ReplayedLayer

_ATTENTION_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_MLP_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
"""names in Megatron's distributed checkpoints: those of Transformer Engine's fused modules, in either spec"""


def parts_of(config: TransformerConfig) -> Parts:
    """Transformer Engine's for bf16 and FP8 on a GPU where it is installed, else the portable ones.

    Raises:
        ConfigError: FP8 cannot run here.
    """
    if config.fp8:
        check_fp8(str(config.fp8_recipe))
    if not takes_transformer_engine(config.params_dtype):
        return PORTABLE
    from mcore_rl.model.engine import PARTS  # can be imported only with Transformer Engine

    return PARTS


def block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage."""
    parts = parts_of(config)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    sparse = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else [0] * config.num_layers
    layers = [layer_spec(config, parts, sparse=bool(sparse[first + i])) for i in range(count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=parts.norm)


def layer_spec(config: TransformerConfig, parts: Parts, *, sparse: bool) -> ModuleSpec:
    """One layer. A mixture of experts keeps its norm apart: the router reads the normalized states too."""
    fused = parts.norm_column is not None
    qk_norm = parts.norm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.norm_column or parts.column,
            core_attention=parts.attention,
            linear_proj=parts.row,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    if sparse:
        linears = MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row)
        experts = ModuleSpec(module=SequentialMLP, submodules=linears)
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
    else:
        linears = MLPSubmodules(linear_fc1=parts.norm_column or parts.column, linear_fc2=parts.row)
        mlp = versions.mlp_module(linears)
    names = {} if fused else _ATTENTION_NORM if sparse else _ATTENTION_NORM | _MLP_NORM
    return ModuleSpec(
        module=ReplayedLayer if sparse else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else parts.norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=IdentityOp if fused and not sparse else parts.norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            sharded_state_dict_keys_map=names,
        ),
    )
