"""Policy losses, one value per token, to be minimised: each is `loss(rows, **params)`; see rows.py.

Elementwise: [N, T] or flat [R] rows alike. Notation: d = log_prob - old, r = e^d, A advantage. Log-ratios are
bounded at +-20 (see ratio.py). `clip/fraction`: the clip or gate acts on the token; each loss says how.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mcore_rl.algo.metrics import Max, Mean, Metric, Min
from mcore_rl.algo.ratio import LOG_RATIO_BOUND, log_ratio
from mcore_rl.algo.rows import Rows, TokenLoss, reads


def ppo(
    rows: Rows, *, eps_low: float = 0.2, eps_high: float = 0.2, dual_clip: float | None = None
) -> TokenLoss:
    """max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)): PPO, arXiv 1707.06347 eq. 7; GRPO, 2402.03300 eq. 3.

    eps_high > eps_low is DAPO's clip-higher (2503.14476 section 3.1). `dual_clip` c > 1 also bounds the loss
    at -A c where A < 0 (1912.09729), off by default. Clipped: the gradient is cut.
    """
    return _clipped_surrogate(
        log_ratio(rows.log_prob, rows.old), rows.advantage, eps_low, eps_high, dual_clip
    )


@reads("sequence_log_ratio")
def gspo(rows: Rows, *, eps_low: float = 3e-4, eps_high: float = 4e-4) -> TokenLoss:
    """PPO's clip of s_t = sg[s] e^(log_prob - sg[log_prob]): GSPO-token, arXiv 2507.18071 section 4.3.

    log s is the mean of d over the whole sequence. With one advantage per sequence it equals GSPO (eq. 5) in
    value and gradient; with one per token it is GSPO-token. The sequence's mean is a constant, so no
    collective needs a backward pass.
    """
    slope = log_ratio(rows.log_prob, rows.old)
    mean = rows.sequence_log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return _clipped_surrogate(mean + (slope - slope.detach()), rows.advantage, eps_low, eps_high)


def sapo(rows: Rows, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> TokenLoss:
    """-A (4 / tau) sigmoid(tau (r - 1)), tau = tau_pos where A > 0 else tau_neg: SAPO, arXiv 2511.20347.

    d/dlog_prob = -A r 4p(1-p), p = sigmoid(tau (r - 1)): the policy gradient at r = 1, fading on both sides.
    The value has an offset (2/tau at r = 1), so only gradients compare with PPO's. Clipped: the gate 4p(1-p)
    is below 1/2.
    """
    ratio = log_ratio(rows.log_prob, rows.old).exp()
    tau = torch.where(rows.advantage > 0, torch.full_like(rows.advantage, tau_pos), tau_neg)
    p = torch.sigmoid(tau * (ratio - 1))
    gate = (4 * p * (1 - p)).detach()
    return TokenLoss(-rows.advantage * p * 4 / tau, ratio_metrics(ratio, gate < 0.5))


def cispo(rows: Rows, *, eps_high: float = 0.28) -> TokenLoss:
    """-sg[min(r, 1 + eps_high)] A log_prob: CISPO, arXiv 2506.13585 eq. 4-5.

    eps_high is a distance from 1, not the absolute cap. Clipped: the weight is capped, and the gradient never
    cut.
    """
    ratio = log_ratio(rows.log_prob, rows.old).exp().detach()
    loss = -ratio.clamp(max=1 + eps_high) * rows.advantage * rows.log_prob
    return TokenLoss(loss, ratio_metrics(ratio, ratio > 1 + eps_high))


def reinforce(rows: Rows) -> TokenLoss:
    """-A log_prob (Williams 1992): on-policy only, for one optimizer step per rollout. Clipped: never."""
    ratio = log_ratio(rows.log_prob, rows.old).exp().detach()
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return TokenLoss(-rows.advantage * rows.log_prob, ratio_metrics(ratio, never))


@reads("sequence_rollout_log_ratio")
def deepseek_masked(
    rows: Rows, *, eps_low: float = 0.2, eps_high: float = 0.2, delta: float = 0.1
) -> TokenLoss:
    """PPO's loss times the off-policy sequence mask M of DeepSeek-V3.2, arXiv 2512.02556 eq. 9.

    M = 0 iff A < 0 and the sequence's mean of log(behaviour / current) exceeds delta. M is a constant,
    multiplies this term only (not the KL) and leaves the denominators alone. The paper gives no delta. The
    behaviour policy is the one that sampled, which covers staleness and engine mismatch. Clipped: cut or
    masked.
    """
    clip = ppo(rows, eps_low=eps_low, eps_high=eps_high)
    masked = (rows.advantage < 0) & (-rows.sequence_rollout_log_ratio > delta)
    cut = Mean(clip.metrics["clip/fraction"].values | masked)  # type: ignore[operator]
    return TokenLoss(torch.where(masked, 0.0, clip.loss), {**clip.metrics, "clip/fraction": cut})


def ratio_metrics(ratio: Float[Tensor, "*shape"], clipped: Bool[Tensor, "*shape"]) -> dict[str, Metric]:
    """What every loss with an importance ratio logs."""
    return {
        "ratio/mean": Mean(ratio),
        "ratio/max": Max(ratio),
        "ratio/min": Min(ratio),
        "clip/fraction": Mean(clipped),
    }


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
    return TokenLoss(-advantage * used, ratio_metrics(value, cut))
