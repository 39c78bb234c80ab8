"""KL estimators per token and the adaptive KL coefficient.

With x = ref_log_prob - log_prob for tokens sampled from the policy (Schulman, "Approximating KL divergence",
2020; gradients: arXiv 2506.09477 and 2510.01555):

    k1 = -x             unbiased value; as a loss its gradient has mean 0: use it in the reward
    k2 = x^2 / 2        biased value, unbiased gradient on-policy
    k3 = e^x - x - 1    unbiased value; its gradient is that of the forward KL(ref || policy)
    *_iw = r k          times the importance ratio with its gradient; k3_iw (DeepSeek-V3.2, arXiv 2512.02556)
                        is unbiased in value and gradient for any behaviour policy: r (log_prob - ref)

Outputs are not clamped: a clamp on k3 has gradient 0 exactly on runaway tokens. Only exponents are bounded
(ratio.py).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mcore_rl.algo.ratio import bounded, difference, log_ratio
from mcore_rl.errors import ConfigError

KLEstimator = Literal["k1", "k2", "k3", "k1_iw", "k2_iw", "k3_iw"]


def kl(
    estimator: KLEstimator,
    log_prob: Float[Tensor, "*shape"],
    ref_log_prob: Float[Tensor, "*shape"],
    old_log_prob: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Per-token KL(policy || reference), differentiable in log_prob; 0 where the reference is not finite.

    Args:
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
        case "k3":
            value = torch.expm1(bounded(x)) - x
        case _:
            raise ConfigError(
                f"algorithm.kl_estimator: {estimator!r} is not one of {', '.join(get_args(KLEstimator))}"
            )
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
