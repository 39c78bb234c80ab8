"""The gradient scale of the lm_head, measured and predicted from numbers the loss has anyway.

With dL/dlogits = coef / T (onehot - p), its L1 norm is 2 |coef| (1 - p_y) / T. Over tokens drawn from p, E[1
- p_y] = 1 - sum p^2 <= 1 - e^(-H), because the collision entropy is at most the Shannon entropy H; and by
Jensen mean(1 - p_y) <= 1 - e^(-mean cross-entropy) on any data.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mcore_rl.errors import NumericsError

ALERT_RATIO = 1.05


class GradientScale(NamedTuple):
    """Means over scored tokens."""

    measured: float
    """|c| (1 - p_y), c the loss's derivative in log_prob before the aggregation weight"""
    predicted: float
    """|A| (1 - e^(-H)) per token: A and H correlate, so it is not a product of means"""
    surprise: float
    """1 - p_y"""
    cross_entropy: float
    """-log p_y, in nats"""

    @property
    def ratio(self) -> float:
        """measured / predicted: at most 1 up to sampling noise on the first, on-policy mini-batch of a step.

        A ratio that stays above ALERT_RATIO there points at shifted labels, another temperature, top-p, or a
        mismatch between the engines.
        """
        return self.measured / self.predicted if self.predicted > 0 else 0.0

    @property
    def surprise_bound(self) -> float:
        """1 - e^(-cross_entropy), exact for every batch."""
        return -math.expm1(-self.cross_entropy)


def gradient_scale_sums(
    log_prob: Float[Tensor, " R"],
    entropy: Float[Tensor, " R"],
    advantage: Float[Tensor, " R"],
    coefficient: Float[Tensor, " R"],
) -> Float[Tensor, " terms"]:
    """[measured, predicted, surprise, cross-entropy, tokens] summed over rows in float64.

    Add them up over DP x CP before `gradient_scale`.

    Args:
        coefficient: dloss/dlog_prob of the per-token loss, before the aggregation weight.
    """
    log_p, spread, a, c = (x.detach().double() for x in (log_prob, entropy, advantage, coefficient))
    surprise = -torch.expm1(log_p)
    terms = [c.abs() * surprise, a.abs() * -torch.expm1(-spread), surprise, -log_p, torch.ones_like(log_p)]
    return torch.stack(terms).sum(1)


def gradient_scale(sums: Float[Tensor, " terms"]) -> GradientScale:
    """Global sums of `gradient_scale_sums` -> means; all 0 for no token."""
    *totals, tokens = sums.tolist()
    return GradientScale(*(total / max(tokens, 1.0) for total in totals))


def check_surprise(scale: GradientScale, *, tolerance: float = 1e-6) -> None:
    """Assert mean(1 - p_y) <= 1 - e^(-cross-entropy), which holds exactly for whatever data.

    Raises:
        NumericsError: it does not: log-probs and probabilities come from different distributions.
    """
    # `not <=` rather than `>`: a NaN must not pass
    if not scale.surprise <= scale.surprise_bound + tolerance:
        raise NumericsError(
            f"lm_head: mean(1 - p) = {scale.surprise:.6g} exceeds 1 - exp(-CE) = {scale.surprise_bound:.6g}; "
            "check temperature, vocabulary padding and precision of the head"
        )
