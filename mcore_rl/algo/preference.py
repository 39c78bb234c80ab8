"""Supervised losses: fine-tuning, preference pairs, binary feedback, reward models.

One value per token, pair or sample; P pairs, N samples. The caller divides by the GLOBAL number of them; both
answers of a pair lie on one rank. Sequence log-probs are sums over the scored response tokens (means where
said).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid


def sft(log_prob: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """-log_prob per token; aggregated by token-mean."""
    return -log_prob


def margin(
    chosen: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    ref_chosen: Float[Tensor, " P"],
    ref_rejected: Float[Tensor, " P"],
) -> Float[Tensor, " P"]:
    """(chosen - rejected) of the policy minus that of the reference: what DPO, cDPO, rDPO and IPO judge."""
    return (chosen - rejected) - (ref_chosen - ref_rejected)


def dpo(
    margins: Float[Tensor, " P"], *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Float[Tensor, " P"]:
    """-logsigmoid(beta D): DPO, arXiv 2305.18290 eq. 7.

    label_smoothing e > 0 is cDPO (Mitchell 2023): -(1 - e) logsigmoid(beta D) - e logsigmoid(-beta D).
    """
    scaled = beta * margins
    return -(1 - label_smoothing) * logsigmoid(scaled) - label_smoothing * logsigmoid(-scaled)


def robust_dpo(
    margins: Float[Tensor, " P"], *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Float[Tensor, " P"]:
    """rDPO, arXiv 2403.00409: unbiased under labels flipped with probability e = label_smoothing < 1/2.

    (-(1 - e) logsigmoid(beta D) + e logsigmoid(-beta D)) / (1 - 2e); cDPO has the other sign of e.
    """
    scaled = beta * margins
    flipped = label_smoothing * logsigmoid(-scaled)
    return (flipped - (1 - label_smoothing) * logsigmoid(scaled)) / (1 - 2 * label_smoothing)


def ipo(margins: Float[Tensor, " P"], *, tau: float = 0.1) -> Float[Tensor, " P"]:
    """(D - 1 / (2 tau))^2: IPO, arXiv 2310.12036 eq. 17.

    The paper's D is made of sequence SUMS; sequence MEANS give the length-normalised form that TRL uses.
    """
    return (margins - 1 / (2 * tau)).square()


def orpo_odds(
    chosen_mean: Float[Tensor, " P"], rejected_mean: Float[Tensor, " P"], *, weight: float = 0.1
) -> Float[Tensor, " P"]:
    """-weight logsigmoid(log odds ratio), odds from MEAN log-probs: ORPO, arXiv 2403.07691 eq. 6-7.

    ORPO's whole loss adds `sft` of the chosen answers by token-mean.
    """
    log_odds = (chosen_mean - rejected_mean) - (_log1mexp(chosen_mean) - _log1mexp(rejected_mean))
    return -weight * logsigmoid(log_odds)


def kto(
    log_ratios: Float[Tensor, " N"],
    desirable: Bool[Tensor, " N"],
    reference_point: Float[Tensor, ""],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " N"]:
    """lambda - value: KTO, arXiv 2402.01306 eq. 8; h = log pi / pi_ref summed over the response.

    value = lambda_D sigmoid(beta (h - z0)) for a desirable answer, lambda_U sigmoid(beta (z0 - h)) for
    another.

    Args:
        reference_point: mean of h over MISMATCHED prompt-answer pairs of the global batch; taken at 0 or
            above and as a constant.
    """
    sign = torch.where(desirable, 1.0, -1.0).to(log_ratios.dtype)
    weight = torch.where(desirable, torch.full_like(log_ratios, desirable_weight), undesirable_weight)
    z0 = reference_point.detach().clamp(min=0)
    return weight * (1 - torch.sigmoid(beta * sign * (log_ratios - z0)))


def bradley_terry(
    chosen: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    margins: Float[Tensor, " P"] | float = 0.0,
    *,
    center_coef: float = 0.0,
) -> Float[Tensor, " P"]:
    """-logsigmoid(s_c - s_r - margin) + center_coef (s_c + s_r)^2, scores at the last unmasked token.

    Reward model of arXiv 2203.02155 eq. 1, margin of 2307.09288 section 3.2.2, centring of 2312.09244.
    """
    return -logsigmoid(chosen - rejected - margins) + center_coef * (chosen + rejected).square()


def _log1mexp(a: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """log(1 - e^a) for a < 0 without cancellation (Maechler 2012); a = 0 is taken one rounding below 0."""
    a = a.clamp(max=-torch.finfo(a.dtype).eps)
    small = a > -math.log(2)
    # both branches see harmless arguments: an unselected inf would turn the gradient into NaN
    near = torch.log(-torch.expm1(torch.where(small, a, -1.0)))
    return torch.where(small, near, torch.log1p(-torch.exp(torch.where(small, -1.0, a))))


def kept_log_prob(
    logits: Float[Tensor, "*shape V"],
    targets: Int[Tensor, "*shape"],
    keep: Bool[Tensor, "*shape V"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """log softmax over the kept entries only: the Keep Sampling Mask of DeepSeek-V3.2, arXiv 2512.02556.

    The sampled token always counts as kept. d/dlogits = (onehot - p_kept) / temperature on kept entries, 0
    elsewhere. A KL against a reference must use the same mask on both sides, or none.
    """
    keep = keep.scatter(-1, targets[..., None], True)
    scaled = (logits / temperature).masked_fill(~keep, -torch.inf)
    return torch.log_softmax(scaled, dim=-1).gather(-1, targets[..., None]).squeeze(-1)
