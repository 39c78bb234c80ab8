"""Losses of a user's own that read more than their rows: a mean of their own, and marked rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mcore_rl.algo.losses import log_ratio
from mcore_rl.algo.rows import Rows, TokenLoss, marks, reads


def squared(rows: Rows, *, power: float) -> Tensor:
    """|d|^power: how far the policy has gone at a token."""
    return (rows.log_prob - rows.old).abs() ** power


@reads("sequence_rollout_log_ratio", distance=squared)
def damped(rows: Rows, *, power: float = 2.0) -> TokenLoss:
    """A sequence counts for less the further the policy has gone in it."""
    weight = torch.exp(-rows.mean_of("distance") - rows.sequence_rollout_log_ratio.abs())
    return TokenLoss(-weight * rows.advantage * log_ratio(rows.log_prob, rows.old).exp())


def likeliest(advantage: Tensor, old: Tensor, rollout: Tensor, *, share: float) -> Tensor:
    """The share of all tokens with the largest log-prob."""
    return old >= old.sort(descending=True).values[: max(1, int(share * len(old)))].min()


@marks(likeliest)
def unlikely_alone(rows: Rows, *, share: float = 0.5) -> TokenLoss:
    """What was likely anyway is not trained."""
    return TokenLoss(torch.where(rows.marked, 0.0, -rows.advantage * rows.log_prob))
