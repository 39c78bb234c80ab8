"""Policy losses whose ratio is one of the whole sequence, or of a part of it; the contract is in rows.py.

What they read of the sequence is a constant, so that no collective needs a backward pass: the gradient goes
through the row's own log-prob alone, and is that of the paper where a sequence has one advantage.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mcore_rl.algo.losses import LOG_RATIO_BOUND, clipped_surrogate, log_ratio, ratio_metrics
from mcore_rl.algo.rows import Rows, TokenLoss, ahead, reads


def _through_row(log_value: Tensor, slope: Tensor) -> Tensor:
    """`log_value`, bounded, as a value, with the gradient of `slope`."""
    return log_value.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND) + (slope - slope.detach())


@reads("sequence_kept_log_ratio")
def gspo_kept(
    rows: Rows, *, eps_low: float = 3e-4, eps_high: float = 4e-4, dual_clip: float | None = None
) -> TokenLoss:
    """GSPO, arXiv 2507.18071, whose ratio is the mean over what the correction has not rejected.

    NeMo-RL and AReaL mask what they reject before the mean is taken. Without a correction it is `gspo`.
    """
    log_s = _through_row(rows.sequence_kept_log_ratio, log_ratio(rows.log_prob, rows.old))
    return clipped_surrogate(log_s, rows.advantage, eps_low, eps_high, dual_clip)


@reads("sequence_log_ratio")
def sapo_sequence(rows: Rows, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> TokenLoss:
    """-A (4 / tau) sigmoid(tau (s - 1)): SAPO's gate, arXiv 2511.20347, on GSPO's ratio s of the sequence.

    d/dlog_prob = -A s 4p(1-p), p = sigmoid(tau (s - 1)). Clipped: the gate 4p(1-p) is below 1/2.
    """
    ratio = _through_row(rows.sequence_log_ratio, log_ratio(rows.log_prob, rows.old)).exp()
    tau = torch.where(rows.advantage > 0, torch.full_like(rows.advantage, tau_pos), tau_neg)
    p = torch.sigmoid(tau * (ratio - 1))
    gate = (4 * p * (1 - p)).detach()
    return TokenLoss(-rows.advantage * p * 4 / tau, ratio_metrics(ratio.detach(), gate < 0.5))


def clipped_log_ratio(rows: Rows, *, clip_low: float, clip_high: float) -> Float[Tensor, "*shape"]:
    """d, at most clip_high where A > 0 and at least -clip_low where A < 0: GMPO's clip of a token."""
    d = log_ratio(rows.log_prob, rows.old)
    return torch.where(rows.advantage > 0, d.clamp(max=clip_high), d.clamp(min=-clip_low))


@reads(clipped=clipped_log_ratio)
def gmpo(rows: Rows, *, clip_low: float = 0.4, clip_high: float = 0.4) -> TokenLoss:
    """-A exp(mean_t of the clipped d): the geometric mean of GMPO, arXiv 2507.20673.

    The bounds are those of log r, by default of (e^-0.4, e^0.4) as in the paper. d/dlog_prob = -A times that
    mean where the token's d is not clipped, 0 where it is; 1/n of the sequence comes with the aggregation.
    Clipped: the gradient of the token is cut.
    """
    own = clipped_log_ratio(rows, clip_low=clip_low, clip_high=clip_high)
    d = log_ratio(rows.log_prob.detach(), rows.old)
    ratio = _through_row(rows.mean_of("clipped"), own).exp()
    return TokenLoss(-rows.advantage * ratio, ratio_metrics(d.exp(), own.detach() != d))


@reads("sequence_rollout_log_ratio_sum")
def vespo(
    rows: Rows, *, k_pos: float = 2.0, lambda_pos: float = 3.0, k_neg: float = 3.0, lambda_neg: float = 2.0
) -> TokenLoss:
    """-sg[e^lambda W^k e^(-lambda W)] A log_prob, k and lambda by A's sign: VESPO, 2602.10693 section 3.4.

    W is the product of the ratios to the policy that sampled, over the whole sequence, within 1e-8 and e^20.
    The weight is 1 at W = 1. Clipped: the weight is below 1/2.
    """
    log_w = rows.sequence_rollout_log_ratio_sum.clamp(math.log(1e-8), LOG_RATIO_BOUND)
    up = rows.advantage >= 0
    k = torch.where(up, torch.full_like(log_w, k_pos), k_neg)
    decay = torch.where(up, torch.full_like(log_w, lambda_pos), lambda_neg)
    weight = (decay + k * log_w - decay * log_w.exp()).exp()
    loss = -weight * rows.advantage * rows.log_prob
    return TokenLoss(loss, ratio_metrics(log_w.exp(), weight < 0.5))


@reads("sequence_rollout_log_ratio_sum")
def topr(rows: Rows, *, cap: float = 1.0) -> TokenLoss:
    """-A log_prob where A > 0, -sg[min(W, cap)] A log_prob where A < 0: TOPR, arXiv 2503.14286.

    W is the product of the ratios to the policy that sampled, over the whole sequence: what is rewarded is
    learnt as in supervised training, and what is punished is left once it has become unlikely. Clipped: the
    weight is capped.
    """
    w = rows.sequence_rollout_log_ratio_sum.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    down = rows.advantage < 0
    weight = torch.where(down, w.clamp(max=cap), 1.0)
    return TokenLoss(-weight * rows.advantage * rows.log_prob, ratio_metrics(w, down & (w > cap)))


def future_log_ratio(rows: Rows, *, dual_clip: float, half_life: float) -> tuple[Tensor, float]:
    """(d, 0 where r > dual_clip; the discount, half after `half_life` tokens): FIPO's signal of a token."""
    d = log_ratio(rows.log_prob, rows.old)
    return torch.where(d > math.log(dual_clip), 0.0, d), 0.5 ** (1 / half_life)


@ahead(future_log_ratio)
def fipo(
    rows: Rows,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    dual_clip: float = 10.0,
    half_life: float = 32.0,
    weight_low: float = 1.0,
    weight_high: float = 1.2,
) -> TokenLoss:
    """PPO's loss of sg[clip(e^F, weight_low, weight_high)] A, F the discounted sum of d ahead: FIPO.

    arXiv 2603.19835, by its authors' trainer: F_t = sum_k 2^(-k / half_life) d_(t + k), without the tokens of
    r > dual_clip: a token is credited for a future that the policy has made likelier since. Distances are
    those of the response, observations included. Clipped: the gradient is cut.
    """
    weight = rows.ahead.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().clamp(weight_low, weight_high)
    log_r = log_ratio(rows.log_prob, rows.old)
    return clipped_surrogate(log_r, weight * rows.advantage, eps_low, eps_high, dual_clip)
