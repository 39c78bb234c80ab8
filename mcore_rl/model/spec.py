"""Architecture, layout and precision -> Megatron-Core's TransformerConfig and the layers of a stage.

Layers are Megatron's, built of Transformer Engine's modules or of portable ones.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from mcore_rl.errors import ConfigError
from mcore_rl.model import versions
from mcore_rl.model.activations import activation_settings
from mcore_rl.model.fusions import fast_settings, tuned_settings
from mcore_rl.model.hf.architecture import Architecture, Experts
from mcore_rl.model.latent import CHECKPOINT_NAMES, latent_attention, latent_settings
from mcore_rl.model.layouts import DTYPES
from mcore_rl.model.modules import ExtendedAttention, LayerRotation, ResidualAdd, biased
from mcore_rl.model.portable import PORTABLE, PackedAttention, Parts
from mcore_rl.model.precision import NEEDS_ENGINE, check_fp8, engine_is_importable, takes_transformer_engine
from mcore_rl.model.routing import CountingRouter, GroupRouter, ReplayedLayer, needs_own_router
from mcore_rl.parallel.layout import Layout
from mcore_rl.precision import DEFAULT_FP8, Fp8
from mcore_rl.tuning import DEFAULT_TUNING, Tuning


def transformer_config(
    arch: Architecture,
    layout: Layout,
    precision: str,
    tuning: Tuning = DEFAULT_TUNING,
    fp8: Fp8 = DEFAULT_FP8,
) -> TransformerConfig:
    """Megatron's configuration of `arch` at `layout`.

    The flags that differ from Megatron's defaults: no dropout, RMSNorm, SwiGLU, no biases, fusions on where
    they can run (model.fusions); p2p flags without which the interleaved schedule is silently wrong (grad
    norm 5.5 instead of 1.96).

    Raises:
        ConfigError: experts in FP8 without Transformer Engine, or a choice of `tuning` that cannot run here.
    """
    if precision == "fp8" and arch.experts is not None and not engine_is_importable():
        raise ConfigError(NEEDS_ENGINE)  # Megatron compares versions with one that is absent: a TypeError
    on_gpu = torch.cuda.is_available()
    dtype = DTYPES[precision]
    engine = takes_transformer_engine(dtype)
    kind = TransformerConfig if arch.latent is None else MLATransformerConfig
    return kind(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.intermediate
        or arch.hidden,  # Megatron wants one; without dense layers no MLP has it
        gated_linear_unit=True,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=arch.centered_norms,
        window_size=(arch.windows.size - 1, 0) if arch.windows.size else None,
        window_attn_skip_freq=[int(windowed) for windowed in arch.windows.layers] or None,
        layernorm_epsilon=arch.norm_eps,
        qk_layernorm=arch.qk_norm,
        softmax_scale=arch.scales.attention,
        rotary_interleaved=arch.rotary.interleaved and arch.latent is None,  # latent attention turns itself
        no_rope_freq=[int(layer in arch.unturned_layers) for layer in range(arch.layers)]
        if arch.unturned_layers
        else None,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,  # an expert is never cut; parallel.mesh builds the groups so
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,
        overlap_p2p_comm=layout.virtual_pipeline is not None,
        batch_p2p_comm=layout.virtual_pipeline is None,
        deallocate_pipeline_outputs=layout.pipeline > 1 and layout.virtual_pipeline is None,
        calculate_per_token_loss=False,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,  # weights come by global name, from a checkpoint or a seeded generator
        bias_dropout_fusion=on_gpu,
        softmax_type="learnable" if arch.sinks else "vanilla",
        **activation_settings(arch),
        **latent_settings(arch),
        **_expert_settings(arch.experts, precision),
        **(_fp8_settings(fp8) if precision == "fp8" else {}),
        **fast_settings(arch, engine=engine, fp8=fp8 if precision == "fp8" else None),
        **tuned_settings(arch, tuning, engine=engine),
    )


def _fp8_settings(fp8: Fp8) -> dict[str, Any]:
    """Megatron enters the recipe around its layers only: embedding and lm_head are never in FP8."""
    return {
        "fp8": "hybrid",  # e4m3 forward, e5m2 for the gradients of activations
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.param_gather,
        "fp8_amax_history_len": 1024,  # Transformer Engine's own; read by "delayed" only
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": fp8.first_last_bf16,
        "fp8_dot_product_attention": False,  # its softmax is what log-probs rest on
        "fp8_multi_head_attention": False,
    }


def _expert_settings(experts: Experts | None, precision: str) -> dict[str, Any]:
    if experts is None:
        return {}
    limited = experts.groups_per_token < experts.groups
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.intermediate,
        "moe_layer_freq": [int(sparse) for sparse in experts.sparse_layers],
        # Softmax over the chosen logits alone is the softmax over all, divided by the sum of the chosen.
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_score_function": "sigmoid" if experts.sigmoid else "softmax",
        "moe_router_enable_expert_bias": experts.sigmoid,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_num_groups": experts.groups if limited else None,
        "moe_router_group_topk": experts.groups_per_token if limited else None,
        "moe_router_topk_scaling_factor": None if experts.scale == 1.0 else experts.scale,
        "moe_shared_expert_intermediate_size": experts.shared or None,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_router_dtype": "fp64" if precision == "fp64" else "fp32",
        # A batch-level auxiliary loss depends on how the batch is split: it would differ between layouts.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


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


def block_spec(
    config: TransformerConfig, arch: Architecture, vp_stage: int | None = None, *, fused: bool = True
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage.

    Args:
        fused: a norm is joined with the linear layer behind it, where Transformer Engine has such a module;
            an adapter of the layer reads what is between them.
    """
    parts = parts_of(config)
    parts = parts if fused else replace(parts, norm_column=None)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [layer_spec(config, arch, parts, first + i) for i in range(count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=parts.norm)


def layer_spec(config: TransformerConfig, arch: Architecture, parts: Parts, layer: int) -> ModuleSpec:
    """Layer `layer`, from 0.

    A mixture of experts keeps its norm apart: the router reads the normalized states too.
    """
    sparse = arch.is_sparse(layer)
    fused = arch.input_norms and parts.norm_column is not None
    names = CHECKPOINT_NAMES if arch.latent else {} if fused else _ATTENTION_NORM
    if not (fused or sparse):
        names = names | _MLP_NORM
    norm = parts.norm if arch.input_norms else IdentityOp
    add = _residual_add(config, arch, parts)
    return ModuleSpec(
        module=ReplayedLayer if sparse else TransformerLayer,
        params={"router_bias": arch.experts.biased} if sparse and arch.experts is not None else {},
        submodules=TransformerLayerSubmodules(
            # Two linear layers read the input of latent attention.
            input_layernorm=IdentityOp if fused and arch.latent is None else norm,
            self_attention=_attention(config, arch, parts, layer, fused=fused),
            self_attn_bda=add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=IdentityOp if fused and not sparse else norm,
            mlp=_mixture(config, arch, parts) if sparse else _mlp(arch, parts, fused=fused),
            mlp_bda=add,  # pyright: ignore[reportArgumentType]
            sharded_state_dict_keys_map=names,
        ),
    )


def _attention(
    config: TransformerConfig, arch: Architecture, parts: Parts, layer: int, *, fused: bool
) -> ModuleSpec:
    if arch.latent is not None:
        return latent_attention(arch, parts)
    norm = parts.norm if arch.qk_norm else IdentityOp
    projection: Any = parts.norm_column if fused else parts.column
    rotary = arch.rotary_of(layer)
    table = None if arch.local_rotary is None else int(rotary is arch.local_rotary)
    turn = LayerRotation(rotary.channels, rotary.scale, table)
    extended = arch.whole_qk_norm or turn.scale != 1.0 or table is not None
    return ModuleSpec(
        module=ExtendedAttention if extended else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal}
        | ({"whole_norm": arch.whole_qk_norm, "turn": turn} if extended else {}),
        submodules=SelfAttentionSubmodules(
            linear_qkv=projection,
            core_attention=_core_attention(config, arch, parts),
            linear_proj=biased(parts.row) if arch.output_bias else parts.row,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def _core_attention(config: TransformerConfig, arch: Architecture, parts: Parts) -> Any:
    """What turns queries, keys and values into outputs.

    Transformer Engine has no cap of scores, and neither windows nor sinks with its ring of keys: the portable
    one stands in for these.
    """
    cap = arch.scales.attention_cap
    if cap is not None:
        return ModuleSpec(module=PackedAttention, params={"cap": cap})
    apart = config.context_parallel_size > 1 and arch.windows.size > 0
    return PackedAttention if apart or config.softmax_type != "vanilla" else parts.attention


def _mlp(arch: Architecture, parts: Parts, *, fused: bool) -> Any:
    first: Any = parts.norm_column if fused else parts.column
    second = parts.row
    if arch.mlp_bias:
        first, second = biased(first), biased(second)
    return versions.mlp_module(MLPSubmodules(linear_fc1=first, linear_fc2=second))


def _mixture(config: TransformerConfig, arch: Architecture, parts: Parts) -> ModuleSpec:
    with_biases = arch.experts is not None and arch.experts.biased
    column, row = (biased(linear) if with_biases else linear for linear in (parts.column, parts.row))
    linears = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    experts = ModuleSpec(module=SequentialMLP, submodules=linears)
    if config.moe_grouped_gemm:
        grouped: Any = MLPSubmodules(linear_fc1=parts.grouped_column, linear_fc2=parts.grouped_row)
        experts = ModuleSpec(module=TEGroupedMLP, submodules=grouped)
    shared = ModuleSpec(module=SharedExpertMLP, submodules=linears)
    router: Any = CountingRouter
    if arch.experts is not None and needs_own_router(arch.experts):
        router = partial(GroupRouter, experts=arch.experts)
    submodules = MoESubmodules(experts=experts, shared_experts=shared, router=router)
    return ModuleSpec(module=MoELayer, submodules=submodules)


def _residual_add(config: TransformerConfig, arch: Architecture, parts: Parts) -> Any:
    if not arch.output_norms and arch.scales.residual == 1.0:
        return get_bias_dropout_add
    norm = parts.norm if arch.output_norms else None
    return ModuleSpec(
        module=ResidualAdd, params={"config": config, "norm": norm, "scale": arch.scales.residual}
    )
