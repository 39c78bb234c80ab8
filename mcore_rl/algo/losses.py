"""Losses, one value per token, to be minimised, and what a token's loss is multiplied by.

A policy loss is `loss(rows, **params)`; see rows.py. Elementwise: [N, T] or flat [R] rows alike. Notation: d
= log_prob - old, r = e^d, A advantage. `clip/fraction`: the clip or gate acts on the token; each loss says
how. After the policy losses come the KL to the reference, the corrections for the engine that sampled, the
aggregation of tokens to one number, and the critic's loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mcore_rl.algo.metrics import Max, Mean, Metric, Min
from mcore_rl.algo.rows import Rows, TokenLoss, finite, reads
from mcore_rl.errors import ConfigError

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
    return torch.where(finite(other), log_prob - other, 0.0)


def log_ratio(log_prob: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`bounded(difference(...))`: what every loss exponentiates."""
    return bounded(difference(log_prob, other))


def ppo(
    rows: Rows, *, eps_low: float = 0.2, eps_high: float = 0.2, dual_clip: float | None = None
) -> TokenLoss:
    """max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)): PPO, arXiv 1707.06347 eq. 7; GRPO, 2402.03300 eq. 3.

    eps_high > eps_low is DAPO's clip-higher (2503.14476 section 3.1). `dual_clip` c > 1 also bounds the loss
    at -A c where A < 0 (1912.09729), off by default. Clipped: the gradient is cut.
    """
    return clipped_surrogate(log_ratio(rows.log_prob, rows.old), rows.advantage, eps_low, eps_high, dual_clip)


@reads("sequence_log_ratio")
def gspo(
    rows: Rows, *, eps_low: float = 3e-4, eps_high: float = 4e-4, dual_clip: float | None = None
) -> TokenLoss:
    """PPO's clip of s_t = sg[s] e^(log_prob - sg[log_prob]): GSPO-token, arXiv 2507.18071 section 4.3.

    log s is the mean of d over the whole sequence. With one advantage per sequence it equals GSPO (eq. 5) in
    value and gradient; with one per token it is GSPO-token. The sequence's mean is a constant, so no
    collective needs a backward pass. `dual_clip` as in `ppo`.
    """
    slope = log_ratio(rows.log_prob, rows.old)
    mean = rows.sequence_log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return clipped_surrogate(mean + (slope - slope.detach()), rows.advantage, eps_low, eps_high, dual_clip)


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


def cispo(rows: Rows, *, eps_high: float = 0.28, eps_low: float | None = None) -> TokenLoss:
    """-sg[clip(r, 1 - eps_low, 1 + eps_high)] A log_prob: CISPO, arXiv 2506.13585 eq. 4-5.

    Both are distances from 1, not absolute bounds; without eps_low, as in the paper's runs, there is no lower
    one. Clipped: the weight is at a bound, and the gradient never cut.
    """
    ratio = log_ratio(rows.log_prob, rows.old).exp().detach()
    low = 0.0 if eps_low is None else 1 - eps_low
    loss = -ratio.clamp(min=low, max=1 + eps_high) * rows.advantage * rows.log_prob
    return TokenLoss(loss, ratio_metrics(ratio, (ratio > 1 + eps_high) | (ratio < low)))


def reinforce(rows: Rows) -> TokenLoss:
    """-A log_prob (Williams 1992): on-policy only, for one optimizer step per rollout. Clipped: never."""
    ratio = log_ratio(rows.log_prob, rows.old).exp().detach()
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return TokenLoss(-rows.advantage * rows.log_prob, ratio_metrics(ratio, never))


@reads("sequence_rollout_log_ratio")
def deepseek_masked(
    rows: Rows,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float = 0.1,
) -> TokenLoss:
    """PPO's loss times the off-policy sequence mask M of DeepSeek-V3.2, arXiv 2512.02556 eq. 9.

    M = 0 iff A < 0 and the sequence's mean of log(behaviour / current) exceeds delta. M is a constant,
    multiplies this term only (not the KL) and leaves the denominators alone. The paper gives no delta. The
    behaviour policy is the one that sampled, which covers staleness and engine mismatch. Clipped: cut or
    masked.
    """
    clip = ppo(rows, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip)
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


def clipped_surrogate(
    log_r: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
    eps_low: float,
    eps_high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """-A r, with r frozen at the bound where the clip acts: PPO's eq. 7 (1707.06347) as its two branches."""
    ratio = log_r.exp()
    value = ratio.detach()
    cut = ((advantage > 0) & (value > 1 + eps_high)) | ((advantage < 0) & (value < 1 - eps_low))
    used = torch.where(cut, value.clamp(1 - eps_low, 1 + eps_high), ratio)
    if dual_clip is not None:
        runaway = (advantage < 0) & (value > dual_clip)
        used, cut = torch.where(runaway, dual_clip, used), cut | runaway
    return TokenLoss(-advantage * used, ratio_metrics(value, cut))


KLEstimator = Literal["k1", "k2", "k3", "abs", "k3_straight", "k3_score", "k1_iw", "k2_iw", "k3_iw"]


def kl(
    estimator: KLEstimator,
    log_prob: Float[Tensor, "*shape"],
    ref_log_prob: Float[Tensor, "*shape"],
    old_log_prob: Float[Tensor, "*shape"] | None = None,
    *,
    cap: float | None = None,
) -> Float[Tensor, "*shape"]:
    """Per-token KL(policy || reference), differentiable in log_prob; 0 where the reference is not finite.

    With x = ref_log_prob - log_prob for tokens sampled from the policy (Schulman, "Approximating KL
    divergence", 2020; gradients: arXiv 2506.09477 and 2510.01555):

        k1 = -x             unbiased value; as a loss its gradient has mean 0: use it in the reward
        k2 = x^2 / 2        biased value, unbiased gradient on-policy
        k3 = e^x - x - 1    unbiased value; its gradient is that of the forward KL(ref || policy)
        abs = |x|           not a KL; its gradient is that of twice the total variation
        k3_straight         the value of k3 with the gradient of k2 (verl's "k3+")
        k3_score            k3 e^(log_prob - sg[log_prob]), with the gradient through the sampling: unbiased
                            on-policy (NeMo-RL's)
        *_iw = r k          times the importance ratio with its gradient; k3_iw (DeepSeek-V3.2, arXiv
                            2512.02556) is unbiased in value and gradient for any behaviour policy:
                            r (log_prob - ref)

    Outputs are not clamped unless asked: a clamp on k3 has gradient 0 exactly on runaway tokens. Only
    exponents are bounded.

    Args:
        cap: the largest value of |k|, before an importance ratio; what lies beyond has no gradient, except
            with k3_straight, whose gradient is that of k2 everywhere.
        old_log_prob: of the behaviour policy; only the `_iw` estimators read it.

    Raises:
        ConfigError: unknown estimator, or an `_iw` estimator without old_log_prob.
    """
    x = -difference(log_prob, ref_log_prob)
    match estimator.removesuffix("_iw"):
        case "k1":
            value = -x
        case "k2":
            value = x.square() / 2
        case "k3" | "k3_straight" | "k3_score":
            value = torch.expm1(bounded(x)) - x
        case "abs":
            value = x.abs()
        case _:
            raise ConfigError(
                f"algorithm.kl_estimator: {estimator!r} is not one of {', '.join(get_args(KLEstimator))}"
            )
    if cap is not None:
        value = value.clamp(-cap, cap)
    if estimator == "k3_straight":
        return value.detach() + x.square() / 2 - (x.square() / 2).detach()
    if estimator == "k3_score":
        return value * (log_prob - log_prob.detach()).exp()
    if not estimator.endswith("_iw"):
        return value
    if old_log_prob is None:
        raise ConfigError(
            f"algorithm.kl_estimator: {estimator!r} needs old log-probs; use k2 or k3 without them"
        )
    return torch.where(torch.isfinite(old_log_prob), log_ratio(log_prob, old_log_prob).exp() * value, 0.0)


def adaptive_kl_coefficient(
    coefficient: float,
    observed: float,
    samples: float | int,
    *,
    target: float = 6.0,
    horizon: float = 10_000.0,
) -> float:
    """The next KL coefficient: times 1 + clip(observed / target - 1, +-0.2) samples / horizon.

    `observed` is the mean over sequences of the per-sequence SUM of k1, the unit of the default target
    (Ziegler et al., arXiv 1909.08593 section 2.2); a per-token mean needs a per-token target.
    """
    error = min(max(observed / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * samples / horizon)


def truncate(
    log_weight: Float[Tensor, "*shape"], *, low: float = 0.0, high: float = 2.0
) -> Float[Tensor, "*shape"]:
    """clip(w, low, high): truncated importance sampling (TIS), Ionides 2008; Yao et al. 2025 for engines.

    high = inf is the behaviour weight of decoupled PPO, arXiv 2110.00641.
    """
    return _exp(log_weight).clamp(min=low, max=high)


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
    """A weight against the mismatch between the policy that sampled and the policy that trains.

    It multiplies the policy-gradient term after clipping, never the KL, and leaves the denominators alone.
    All are constants. The log-weight is `rows.old - rows.rollout`: per token, or its sum or mean over the
    usable rows of the whole sequence, on each of its tokens. A token whose log-probs are not all finite is
    not usable (rows.py): its log-weight is 0, its sequence's sum and mean leave it out, and its loss counts
    for nothing.
    """

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


Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum"
]


def aggregation_weight(
    aggregation: Aggregation,
    sequence_tokens: Float[Tensor, "*shape"],
    *,
    tokens: float | int,
    sequences: float | int,
    max_length: float | int,
) -> Float[Tensor, "*shape"]:
    """Weight of every scored token; multiply by the mask where masked tokens are still present.

    Per-token losses become one number by L = sum over rows of weight * loss. The denominators are global over
    one optimizer step (all micro-batches x DP x CP) and known before the forward pass, so the sum does not
    depend on how the rows are split. A mean of micro-batch means is a different, wrong objective.

    Args:
        aggregation: token-mean 1/tokens (DAPO, arXiv 2503.14476 section 3.3; LitePPO, 2508.08221);
            seq-mean-token-mean 1/(n_i sequences) (GRPO, 2402.03300 eq. 3; GSPO, 2507.18071 eq. 5; SAPO,
            2511.20347); seq-mean-token-sum 1/sequences (REINFORCE); seq-mean-token-sum-norm 1/(sequences
            max_length) (Dr. GRPO, 2503.20783); token-sum 1 (verl).
        sequence_tokens: n_i, scored tokens of the WHOLE sequence the token belongs to (not of its CP shard).
        tokens: scored tokens of the whole optimizer step.
        sequences: sequences of the whole optimizer step. All of them by default, fully masked ones included,
            so that filtering out overlong answers does not weigh up the rest; pass the non-empty ones for the
            other reading.
        max_length: response limit in tokens; only seq-mean-token-sum-norm uses it.

    Raises:
        ConfigError: unknown aggregation.
    """
    match aggregation:
        case "token-mean":
            return torch.full_like(sequence_tokens, 1.0 / max(tokens, 1))
        case "seq-mean-token-mean":
            return 1.0 / (sequence_tokens.clamp(min=1) * max(sequences, 1))
        case "seq-mean-token-sum":
            return torch.full_like(sequence_tokens, 1.0 / max(sequences, 1))
        case "seq-mean-token-sum-norm":
            return torch.full_like(sequence_tokens, 1.0 / (max(sequences, 1) * max_length))
        case "token-sum":
            return torch.ones_like(sequence_tokens)
    raise ConfigError(
        f"algorithm.aggregation: {aggregation!r} is unknown; use one of {', '.join(get_args(Aggregation))}"
    )


def weighted_sum(loss: Float[Tensor, "*shape"], weight: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """sum weight * loss, where a row of weight 0 contributes exactly 0 even if its loss is not finite."""
    return torch.where(weight != 0, weight * loss, 0.0).sum()


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
    """The critic's loss max((v - R)^2, (clip(v, v_old +- clip) - R)^2) / 2, per token.

    Source: arXiv 2005.12729, after PPO's code.

    `values[t]` is the value of the state BEFORE token t: the same row as its log-prob. clip None: no
    clipping.
    """
    error = (values - returns).square()
    if clip is None:
        return ValueLoss(error / 2, torch.zeros_like(error, dtype=torch.bool))
    near = (old_values + (values.detach() - old_values).clamp(-clip, clip) - returns).square()
    cut = (near > error.detach()) & ((values.detach() - old_values).abs() > clip)
    return ValueLoss(torch.where(cut, near, error) / 2, cut)
