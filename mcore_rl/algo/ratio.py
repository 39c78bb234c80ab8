"""Log-ratios that survive exp(): bounded in value, never silently without a gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""exp(20) = 4.9e8: far outside every trust region, far inside float32."""


def bounded(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`log_ratio` clamped to +-20 in value, with derivative 1 everywhere.

    A plain clamp has derivative 0 outside, exactly where an unbounded objective (advantage < 0, ratio -> inf)
    must pull the policy back; here the coefficient stays at that of e^20.
    """
    value = log_ratio.detach()
    return value.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND) + (log_ratio - value)


def difference(log_prob: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`log_prob - other`, unbounded; 0 without gradient where `other` is not finite (a masked token)."""
    return torch.where(torch.isfinite(other), log_prob - other, 0.0)


def log_ratio(log_prob: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`bounded(difference(...))`: what every loss exponentiates."""
    return bounded(difference(log_prob, other))
