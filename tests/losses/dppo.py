"""A loss of a user's own: DPPO's total-variation mask, in a file of its own that imports the contract only.

A token is masked where its update would push the policy further from the one that SAMPLED (the servers', by
the rollout's log-prob) and their binary total variation |p - mu| already exceeds `delta`.
"""

from __future__ import annotations

import torch

from mcore_rl.algo.losses import log_ratio
from mcore_rl.algo.metrics import Max, Mean
from mcore_rl.algo.rows import Rows, TokenLoss


def total_variation(rows: Rows, *, delta: float = 0.15) -> TokenLoss:
    """-A r to the sampling policy, 0 where the trust region is left in the direction of the update."""
    ratio = log_ratio(rows.log_prob, rows.rollout).exp()
    distance = (rows.log_prob.detach().exp() - rows.rollout.exp()).abs()
    outward = torch.where(rows.advantage > 0, ratio.detach() > 1, ratio.detach() < 1)
    masked = outward & (distance > delta)
    return TokenLoss(
        torch.where(masked, 0.0, -rows.advantage * ratio),
        {"dppo/masked": Mean(masked), "dppo/total_variation": Max(distance)},
    )
