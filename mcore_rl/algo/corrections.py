"""Weights against the mismatch between the policy that sampled and the policy that trains.

A weight multiplies the policy-gradient term after clipping, never the KL, and leaves the denominators alone.
All are constants. `log_weight` is `rows.old - rows.rollout`: per token, or its sum or mean over the usable
rows of the whole sequence, on each of its tokens. A token whose log-probs are not all finite is not usable
(rows.py): its log-weight is 0, its sequence's sum and mean leave it out, and its loss counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mcore_rl.algo.ratio import LOG_RATIO_BOUND


def truncate(log_weight: Float[Tensor, "*shape"], *, high: float = 2.0) -> Float[Tensor, "*shape"]:
    """min(w, high): truncated importance sampling (TIS), Ionides 2008; Yao et al. 2025 for rollout engines.

    high = inf is the behaviour weight of decoupled PPO, arXiv 2110.00641.
    """
    return _exp(log_weight).clamp(max=high)


def mask_outside(
    log_weight: Float[Tensor, "*shape"], *, low: float = 0.0, high: float = 2.0
) -> Float[Tensor, "*shape"]:
    """w where low <= w <= high, else 0: MIS; with 0.5 and 5 it is IcePop, arXiv 2510.18855."""
    weight = _exp(log_weight)
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)


def keep_within(
    log_weight: Float[Tensor, "*shape"], *, low: float = 0.99, high: float = 1.05
) -> Float[Tensor, "*shape"]:
    """1 where low <= w <= high, else 0; with the sequence mean it is the geometric-mean sequence mask."""
    weight = _exp(log_weight)
    return ((weight >= low) & (weight <= high)).to(weight.dtype)


def _exp(log_weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return log_weight.detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


@dataclass(frozen=True)
class Correction:
    """A weight function, the log-weight it reads, and where its defaults differ from the function's."""

    weight: Callable[..., Tensor]
    reads: Literal["token", "sequence-sum", "sequence-mean"]
    params: Mapping[str, float] = field(default_factory=dict)


CorrectionName = Literal[
    "none", "tis-token", "tis-sequence", "mis-token", "mis-sequence", "icepop", "geometric", "decoupled"
]

CORRECTIONS: Mapping[CorrectionName, Correction] = {
    "tis-token": Correction(truncate, "token"),
    "tis-sequence": Correction(truncate, "sequence-sum"),
    "mis-token": Correction(mask_outside, "token"),
    "mis-sequence": Correction(mask_outside, "sequence-sum", {"high": 3.0}),
    "icepop": Correction(mask_outside, "token", {"low": 0.5, "high": 5.0}),
    "geometric": Correction(keep_within, "sequence-mean"),
    "decoupled": Correction(truncate, "token", {"high": math.inf}),
}
