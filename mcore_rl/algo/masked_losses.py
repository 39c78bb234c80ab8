"""Policy losses with a trust region that masks or penalises tokens; the contract is in rows.py.

What is chosen among all tokens of a rollout (@marks) is chosen before its first update, from numbers that
every rank has: so no layout, no packing and no mini-batch changes the choice.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mcore_rl.algo.losses import clipped_surrogate, difference, log_ratio, ratio_metrics
from mcore_rl.algo.rows import Rows, TokenLoss, marks


def bernoulli_kl(log_p: Float[Tensor, "*shape"], log_q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """KL(p || q) of "this token or another", in nats: p log(p/q) + (1 - p) log((1 - p) / (1 - q)).

    DPPO, arXiv 2602.04879, and KPop bound it. Probabilities keep 1e-8 away from 1.
    """
    p, q = (x.double().exp().clamp(max=1 - 1e-8) for x in (log_p, log_q))
    return p * (log_p.double() - log_q.double()) + (1 - p) * torch.log((1 - p) / (1 - q))


def dppo_tv(
    rows: Rows, *, tv_low: float = 0.2, tv_high: float = 0.2, cap: float = 20.0, drift: float = 0.0
) -> TokenLoss:
    """-sg[min(r, cap)] A log_prob, 0 where p - mu > tv_high (A > 0) or mu - p > tv_low: DPPO, 2602.04879.

    p and mu are the token's probabilities now and under the policy that sampled, r = p / mu, and |p - mu|
    their binary total variation. `drift` adds drift (log r)^2 (Kimi K2.5, 2602.02276). Clipped:
    masked.
    """
    gap = rows.log_prob.detach().exp() - rows.rollout.exp()
    masked = torch.where(rows.advantage > 0, gap > tv_high, gap < -tv_low)
    return _off_policy(rows, masked, cap, drift)


def dppo_kl(
    rows: Rows, *, kl_low: float = 0.05, kl_high: float = 0.05, cap: float = 20.0, drift: float = 0.0
) -> TokenLoss:
    """DPPO, arXiv 2602.04879, with the binary KL(mu || p) of the token beyond kl_high (A > 0) or kl_low.

    Masked only where the update would lead further away; `dppo_tv` has the rest.
    """
    current = rows.log_prob.detach()
    distance = bernoulli_kl(rows.rollout, current)
    further = torch.where(rows.advantage > 0, current > rows.rollout, current < rows.rollout)
    limit = torch.where(rows.advantage > 0, torch.full_like(distance, kl_high), kl_low)
    return _off_policy(rows, further & (distance > limit), cap, drift)


def _off_policy(rows: Rows, masked: Bool[Tensor, "*shape"], cap: float, drift: float = 0.0) -> TokenLoss:
    """REINFORCE with a truncated ratio to the policy that sampled, and 0 where `masked`."""
    log_r = log_ratio(rows.log_prob, rows.rollout)
    weight = torch.where(masked, 0.0, log_r.detach().exp().clamp(max=cap))
    loss = -weight * rows.advantage * rows.log_prob
    if drift:
        loss = loss + drift * log_r.square()
    return TokenLoss(loss, ratio_metrics(log_r.detach().exp(), masked))


def far_tokens(
    advantage: Float[Tensor, " R"],
    old: Float[Tensor, " R"],
    rollout: Float[Tensor, " R"],
    *,
    second_moment: float,
) -> Bool[Tensor, " R"]:
    """The tokens of largest (old - rollout)^2, as many as must go for the mean of the others to be small.

    M2PO, arXiv 2510.01161: the mean of what is left is at most `second_moment`. Tokens of equal
    distance go together, so that their order does not matter.
    """
    square = (old - rollout).square()
    ordered, _ = square.sort()
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, dtype=ordered.dtype)
    within = means <= second_moment  # means of ascending numbers ascend
    if within.all():
        return torch.zeros_like(square, dtype=torch.bool)
    return square >= ordered[int(within.sum())]


@marks(far_tokens)
def m2po(rows: Rows, *, second_moment: float = 0.04) -> TokenLoss:
    """-A r, 0 for the marked tokens: M2PO, arXiv 2510.01161; r to the policy that sampled.

    The mark is that of `far_tokens`, over the whole rollout before its first update (the paper: over each
    mini-batch). Clipped: masked.
    """
    ratio = log_ratio(rows.log_prob, rows.rollout).exp()
    loss = torch.where(rows.marked, 0.0, -rows.advantage * ratio)
    return TokenLoss(loss, ratio_metrics(ratio.detach(), rows.marked))


def covariance(advantage: Float[Tensor, " R"], log_prob: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """(A - mean A)(log_prob - mean log_prob): a token's share in the loss of entropy, 2505.22617."""
    return (advantage - advantage.mean()) * (log_prob - log_prob.mean())


def largest_covariance(
    advantage: Float[Tensor, " R"], old: Float[Tensor, " R"], rollout: Float[Tensor, " R"], *, fraction: float
) -> Bool[Tensor, " R"]:
    """The `fraction` of tokens with the largest covariance, at least one: KL-Cov, arXiv 2505.22617."""
    found = torch.zeros(len(old), dtype=torch.bool)
    if len(old):
        count = max(1, int(fraction * len(old)))
        found[covariance(advantage, old).argsort(descending=True, stable=True)[:count]] = True
    return found


@marks(largest_covariance)
def kl_cov(rows: Rows, *, fraction: float = 0.002, penalty: float = 1.0) -> TokenLoss:
    """-A r, plus penalty |d| on the marked tokens: KL-Cov, arXiv 2505.22617.

    The covariance is that of the whole rollout before its first update. Clipped: penalised.
    """
    d = log_ratio(rows.log_prob, rows.old)
    loss = -rows.advantage * d.exp() + penalty * torch.where(rows.marked, d.abs(), 0.0)
    return TokenLoss(loss, ratio_metrics(d.detach().exp(), rows.marked))


def drawn_covariance(
    advantage: Float[Tensor, " R"],
    old: Float[Tensor, " R"],
    rollout: Float[Tensor, " R"],
    *,
    fraction: float,
    cov_low: float,
    cov_high: float,
) -> Bool[Tensor, " R"]:
    """`fraction` of all tokens, drawn among those of a covariance in (cov_low, cov_high): Clip-Cov.

    The draw is seeded by the number of tokens: every rank draws the same.
    """
    found = torch.zeros(len(old), dtype=torch.bool)
    if len(old):
        values = covariance(advantage, old)
        among = torch.nonzero((values > cov_low) & (values < cov_high))[:, 0]
        order = torch.randperm(len(among), generator=torch.Generator().manual_seed(len(old)))
        found[among[order[: max(1, int(fraction * len(old)))]]] = True
    return found


@marks(drawn_covariance)
def clip_cov(
    rows: Rows,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    fraction: float = 0.0002,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
) -> TokenLoss:
    """PPO's loss, 0 for the marked tokens: Clip-Cov, arXiv 2505.22617. Clipped: cut or marked."""
    log_r = log_ratio(rows.log_prob, rows.old)
    clip = clipped_surrogate(log_r, rows.advantage, eps_low, eps_high, dual_clip)
    cut = clip.metrics["clip/fraction"].values | rows.marked  # type: ignore[operator]
    ratio = clip.metrics["ratio/mean"].values
    assert ratio is not None
    return TokenLoss(torch.where(rows.marked, 0.0, clip.loss), ratio_metrics(ratio, cut))


def dro(rows: Rows, *, tau: float = 1.0) -> TokenLoss:
    """-A log_prob + tau d^2 / 2: Direct Reward Optimisation, arXiv 2405.19107, by token as in verl.

    d/dlog_prob = -A + tau d, linear in how far the policy has gone. Clipped: that has turned the sign.
    """
    d = difference(rows.log_prob, rows.old)
    turned = (rows.advantage * (tau * d.detach() - rows.advantage)) > 0
    loss = -rows.advantage * rows.log_prob + tau * d.square() / 2
    return TokenLoss(loss, ratio_metrics(log_ratio(rows.log_prob, rows.old).detach().exp(), turned))
