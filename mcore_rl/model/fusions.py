"""Megatron's fast paths: which are on where Transformer Engine runs, and what a run has chosen besides.

On by themselves, because each gives the same numbers in less time: experts as one grouped GEMM, permutation
of tokens and choice of experts as one kernel, rotation as one kernel, weight gradients added to Megatron's
buffers by the GEMM that makes them. Each needs Transformer Engine; elsewhere Megatron's plain forms run.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch

from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.model.precision import engine_is_importable
from mcore_rl.precision import RECIPES, Fp8
from mcore_rl.tuning import NEED_ENGINE, Tuning


def fast_settings(arch: Architecture, *, engine: bool, fp8: Fp8 | None) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig.

    Args:
        engine: the layers are Transformer Engine's.
        fp8: the recipe of a model in FP8.
    """
    grouped = engine and groups_experts(arch, fp8)
    experts = {"moe_grouped_gemm": grouped, "moe_permute_fusion": engine, "moe_router_fusion": engine}
    return {
        # A row of angles for every packed token: the kernel for [T, 1, N, D] turns each by its own, whatever
        # sequence it is of. Latent attention turns itself (model.latent).
        "apply_rope_fusion": engine and arch.latent is None,
        "persist_layer_norm": engine,  # of LayerNorm; Transformer Engine's RMSNorm has no other form
        "masked_softmax_fusion": False,  # of an attention that is not built here
        # Megatron's own linear layers refuse the flag without Apex, and the lm_head is one. Transformer
        # Engine's are told by fuse_weight_gradients.
        "gradient_accumulation_fusion": False,
        **(experts if arch.experts is not None else {}),
    }


def groups_experts(arch: Architecture, fp8: Fp8 | None) -> bool:
    """Whether a rank's experts are one grouped linear layer.

    Not with biases of their own (gpt-oss), which Megatron's grouped form adds in another place, and not where
    FP8 scales have a memory: it is kept by expert.
    """
    remembers = fp8 is not None and RECIPES[fp8.recipe].remembers
    return arch.experts is not None and not arch.experts.biased and not remembers


def tuned_settings(arch: Architecture, tuning: Tuning, *, engine: bool) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig.

    Raises:
        ConfigError: a choice that this machine or this model cannot run.
    """
    settings: dict[str, Any] = _dispatcher(tuning)
    if tuning.recompute == "full":
        settings |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if tuning.recompute == "selective":
        _check_modules("train.recompute_modules", tuning.modules, arch)
        if not engine and (asked := NEED_ENGINE & set(tuning.modules)):
            raise ConfigError(
                f'train.recompute_modules has "{min(asked)}", which Megatron computes again by functions of '
                "Transformer Engine, and its layers do not run here (model.precision, or the machine); leave "
                "it out"
            )
        settings |= {"recompute_granularity": "selective", "recompute_modules": list(tuning.modules)}
    if tuning.offload:
        _check_modules("train.offload_modules", tuning.offload, arch)
        if not engine:
            raise ConfigError(
                "train.offload_modules moves activations between a GPU and host memory, and Transformer "
                "Engine's layers do not run here; leave it empty"
            )
        settings |= {"fine_grained_activation_offloading": True, "offload_modules": list(tuning.offload)}
    return settings


_OF_MIXTURES = frozenset({"moe", "moe_act", "expert_fc1"})


def _check_modules(key: str, modules: Iterable[str], arch: Architecture) -> None:
    has = {"mla_up_proj": arch.latent is not None} | dict.fromkeys(_OF_MIXTURES, arch.experts is not None)
    has["shared_experts"] = arch.experts is not None and arch.experts.shared > 0
    for name in modules:
        if not has.get(name, True):
            raise ConfigError(f'{key} has "{name}", and a {arch.family} model has no such part; leave it out')


def _dispatcher(tuning: Tuning) -> dict[str, Any]:
    if tuning.dispatcher == "alltoall":
        return {"moe_token_dispatcher_type": "alltoall"}  # Megatron asks for it with variable lengths
    if not torch.cuda.is_available() or find_spec("deep_ep") is None:
        raise ConfigError(
            f'parallel.dispatcher = "{tuning.dispatcher}" needs a GPU and the package deep_ep, and this '
            'machine lacks one of them; install it, or set parallel.dispatcher = "alltoall"'
        )
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": tuning.dispatcher}


def fuse_weight_gradients(chunk: torch.nn.Module) -> int:
    """Tell Transformer Engine's linear layers to add to `main_grad`; how many of them there are.

    The product is added in float32 by the GEMM itself: one rounding to bf16 and two passes over memory less.
    """
    if not engine_is_importable():
        return 0
    linears = [module for module in chunk.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    for module in linears:
        setattr(module, "fuse_wgrad_accumulation", True)  # noqa: B010  (torch types attributes as modules)
    return len(linears)
