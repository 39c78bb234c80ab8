"""What a run chooses of Megatron's ways to trade time for memory; config, plan and model know it by this.

Everything of which the numbers stay the same and that is never slower has no key: `model.fusions` has those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts", "mla_up_proj"]
"""parts of a layer whose activations the backward pass can compute again, as Megatron names them"""
OffloadModule = Literal[
    "core_attn", "attn_proj", "expert_fc1", "moe_act", "attn_norm", "mlp_norm", "qkv_linear"
]
"""parts of a layer whose inputs can wait in host memory for the backward pass, by Megatron's names"""
DispatcherName = Literal["alltoall", "deepep", "hybridep"]
"""how tokens reach the experts of other ranks: Megatron's all-to-all, or kernels of the package deep_ep"""

NEED_ENGINE = frozenset({"layernorm", "moe_act"})
"""parts that Megatron computes again by functions of Transformer Engine"""


@dataclass(frozen=True)
class Tuning:
    """Choices of one model; the defaults are what a model without gradients has."""

    recompute: Literal["none", "selective", "full"] = "none"
    """which activations the backward pass computes again: none, those of `modules`, those of every layer"""
    modules: tuple[RecomputeModule, ...] = ("core_attn",)
    offload: tuple[OffloadModule, ...] = ()
    dispatcher: DispatcherName = "alltoall"


DEFAULT_TUNING = Tuning()
