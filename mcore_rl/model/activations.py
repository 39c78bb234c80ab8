"""The activations of the gate in an MLP, by the names of model.hf.families."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """The Gaussian error linear unit by tanh, arXiv 1606.08415 section 2."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": gelu_tanh}
"""Megatron fuses the first one alone: its fused GELU is the one by tanh, its other one that by erf"""
