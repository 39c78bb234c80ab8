"""The activations of the gate in an MLP, by the names of model.hf.families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcore_rl.model.hf.architecture import Architecture


def gelu_tanh(x: Tensor) -> Tensor:
    """The Gaussian error linear unit by tanh, arXiv 1606.08415 section 2."""
    return F.gelu(x, approximate="tanh")


def sloped_silu(x: Tensor, slope: float) -> Tensor:
    """x sigmoid(slope x): gpt-oss, arXiv 2508.10925 section 2.2."""
    return x * torch.sigmoid(slope * x)


_BY_NAME: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": gelu_tanh}


def activation_settings(arch: Architecture) -> dict[str, Any]:
    """The arguments of Megatron's TransformerConfig that say what an MLP does between its matrices.

    Fused, an MLP keeps its input alone; on a CPU that is plain torch. Megatron fuses SiLU alone here: its
    fused GELU is the one by tanh, its other one that by erf.
    """
    if arch.activation == "clamped":
        return {
            "activation_func": partial(sloped_silu, slope=arch.gate_slope),
            "activation_func_clamp_value": arch.gate_limit,
            "glu_linear_offset": 1.0,
            "bias_activation_fusion": False,
        }
    return {
        "activation_func": _BY_NAME[arch.activation],
        "bias_activation_fusion": arch.activation == "silu",
    }
