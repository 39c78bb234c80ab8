"""Policy losses, one value per token, to be minimised. Elementwise: [N, T] or flat [R] rows alike.

Notation: d = log_prob - old_log_prob, r = e^d, A advantage. Old log-probs and advantages are constants. A
token whose old log-prob is not finite is masked: loss and gradient exactly 0. Log-ratios are bounded at +-20
(see ratio.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mcore_rl.algo.ratio import LOG_RATIO_BOUND, log_ratio


class TokenLoss(NamedTuple):
    """What every policy loss returns; all of the shape of log_prob."""

    loss: Float[Tensor, "*shape"]
    """to be minimised; differentiable in log_prob"""
    ratio: Float[Tensor, "*shape"]
    """importance ratio used, detached (the sequence's ratio for GSPO)"""
    clipped: Bool[Tensor, "*shape"]
    """the clip or gate acts on this token; each loss says how"""


def ppo(
    log_prob: Float[Tensor, "*shape"],
    old_log_prob: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
) -> TokenLoss:
    """max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)): PPO, arXiv 1707.06347 eq. 7; GRPO, 2402.03300 eq. 3.

    eps_high > eps_low is DAPO's clip-higher (2503.14476 section 3.1). `dual_clip` c > 1 also bounds the loss
    at -A c where A < 0 (1912.09729), off by default. `clipped`: the gradient is cut.
    """
    loss = _clipped_surrogate(log_ratio(log_prob, old_log_prob), advantage, eps_low, eps_high, dual_clip)
    return _without_unusable(loss, old_log_prob)


def gspo(
    log_prob: Float[Tensor, "*shape"],
    old_log_prob: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
    sequence_log_ratio: Float[Tensor, "*shape"],
    *,
    eps_low: float = 3e-4,
    eps_high: float = 4e-4,
) -> TokenLoss:
    """PPO's clip of s_t = sg[s] e^(log_prob - sg[log_prob]): GSPO-token, arXiv 2507.18071 section 4.3.

    With one advantage per sequence it equals GSPO (eq. 5) in value and gradient; with one per token it is
    GSPO-token.

    Args:
        sequence_log_ratio: mean of d over all scored tokens of the whole sequence (reduced over CP), on each
            of its tokens; treated as a constant, so no collective needs a backward pass.
    """
    slope = log_ratio(log_prob, old_log_prob)
    sequence = sequence_log_ratio.detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND) + (slope - slope.detach())
    return _without_unusable(_clipped_surrogate(sequence, advantage, eps_low, eps_high), old_log_prob)


def sapo(
    log_prob: Float[Tensor, "*shape"],
    old_log_prob: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> TokenLoss:
    """-A (4 / tau) sigmoid(tau (r - 1)), tau = tau_pos where A > 0 else tau_neg: SAPO, arXiv 2511.20347.

    d/dlog_prob = -A r 4p(1-p), p = sigmoid(tau (r - 1)): the policy gradient at r = 1, fading on both sides.
    The value has an offset (2/tau at r = 1), so only gradients compare with PPO's. `clipped`: the gate
    4p(1-p) is below 1/2.
    """
    ratio = log_ratio(log_prob, old_log_prob).exp()
    tau = torch.where(advantage > 0, torch.full_like(advantage, tau_pos), tau_neg)
    p = torch.sigmoid(tau * (ratio - 1))
    gate = (4 * p * (1 - p)).detach()
    return _without_unusable(TokenLoss(-advantage * p * 4 / tau, ratio.detach(), gate < 0.5), old_log_prob)


def cispo(
    log_prob: Float[Tensor, "*shape"],
    old_log_prob: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
    *,
    eps_high: float = 0.28,
) -> TokenLoss:
    """-sg[min(r, 1 + eps_high)] A log_prob: CISPO, arXiv 2506.13585 eq. 4-5.

    eps_high is a distance from 1, not the absolute cap. `clipped`: the weight is capped, and the
    gradient never cut.
    """
    ratio = log_ratio(log_prob, old_log_prob).exp().detach()
    loss = -ratio.clamp(max=1 + eps_high) * advantage * log_prob
    return _without_unusable(TokenLoss(loss, ratio, ratio > 1 + eps_high), old_log_prob)


def reinforce(
    log_prob: Float[Tensor, "*shape"],
    old_log_prob: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
) -> TokenLoss:
    """-A log_prob (Williams 1992): on-policy only, for one optimizer step per rollout. `clipped`: never."""
    ratio = log_ratio(log_prob, old_log_prob).exp().detach()
    loss = TokenLoss(-advantage * log_prob, ratio, torch.zeros_like(ratio, dtype=torch.bool))
    return _without_unusable(loss, old_log_prob)


def deepseek_masked(
    log_prob: Float[Tensor, "*shape"],
    old_log_prob: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
    sequence_log_ratio: Float[Tensor, "*shape"],
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    delta: float = 0.1,
) -> TokenLoss:
    """PPO's loss times the off-policy sequence mask M of DeepSeek-V3.2, arXiv 2512.02556 eq. 9.

    M = 0 iff A < 0 and the sequence's mean of log(behaviour / current) exceeds delta. M is a constant,
    multiplies this term only (not the KL) and leaves the denominators alone. The paper gives no delta.
    `clipped`: cut or masked.

    Args:
        sequence_log_ratio: mean of log(current / behaviour) over the whole sequence; behaviour is the
            sampling policy's log-prob where it is known (covers staleness and engine mismatch), else the old
            one.
    """
    clip = ppo(log_prob, old_log_prob, advantage, eps_low=eps_low, eps_high=eps_high)
    masked = (advantage < 0) & (-sequence_log_ratio.detach() > delta)
    return TokenLoss(torch.where(masked, 0.0, clip.loss), clip.ratio, clip.clipped | masked)


def _clipped_surrogate(
    log_r: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
    eps_low: float,
    eps_high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """-A r, with r frozen at the bound where the clip acts: PPO's eq. 7 as its two branches."""
    ratio = log_r.exp()
    value = ratio.detach()
    cut = ((advantage > 0) & (value > 1 + eps_high)) | ((advantage < 0) & (value < 1 - eps_low))
    used = torch.where(cut, value.clamp(1 - eps_low, 1 + eps_high), ratio)
    if dual_clip is not None:
        runaway = (advantage < 0) & (value > dual_clip)
        used, cut = torch.where(runaway, dual_clip, used), cut | runaway
    return TokenLoss(-advantage * used, value, cut)


def _without_unusable(loss: TokenLoss, old_log_prob: Float[Tensor, "*shape"]) -> TokenLoss:
    usable = torch.isfinite(old_log_prob)
    return TokenLoss(torch.where(usable, loss.loss, 0.0), loss.ratio, loss.clipped & usable)
