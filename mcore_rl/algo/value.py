"""The critic's loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class ValueLoss(NamedTuple):
    """Both of the shape of values."""

    loss: Float[Tensor, "*shape"]
    """to be minimised; differentiable in values"""
    clipped: Bool[Tensor, "*shape"]
    """the gradient is cut"""


def value_loss(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    *,
    clip: float | None = 0.2,
) -> ValueLoss:
    """max((v - R)^2, (clip(v, v_old +- clip) - R)^2) / 2, per token: arXiv 2005.12729, after PPO's code.

    `values[t]` is the value of the state BEFORE token t: the same row as its log-prob. clip None: no
    clipping.
    """
    error = (values - returns).square()
    if clip is None:
        return ValueLoss(error / 2, torch.zeros_like(error, dtype=torch.bool))
    near = (old_values + (values.detach() - old_values).clamp(-clip, clip) - returns).square()
    cut = (near > error.detach()) & ((values.detach() - old_values).abs() > clip)
    return ValueLoss(torch.where(cut, near, error) / 2, cut)
