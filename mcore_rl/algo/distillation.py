"""Divergences of a student from a teacher over the whole vocabulary.

With p = softmax(z) of the student and q of the teacher, at a position:

    forward KL    KL(q || p) = sum q (log q - log p)               dD/dz = p - q
    reverse KL    KL(p || q) = sum p (log p - log q)               dD/dz = p (log p - log q - D)
    Jensen-Shannon, generalised, with m = beta q + (1 - beta) p (GKD, arXiv 2306.13649, eq. 1)
                  beta KL(q || m) + (1 - beta) KL(p || m)
                                                 dD/dz = (1 - beta) p (log p - log m - KL(p || m))

Each is a sum over tokens, so that parts of the vocabulary may be summed apart and added: `sums` of a part,
`value` and `logit_gradient` from the sums of the whole. The teacher has no gradient.

On tokens that the student samples, the reverse KL of a position has the gradient of `sampled_reverse_kl` in
expectation.

Legend: C positions, L tokens of a part of the vocabulary. `log_p` and `log_q` [C, L] are log-probs over the
WHOLE vocabulary, of the tokens of the part; sums are [S, C], values [C], gradients [C, L].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mcore_rl.errors import ConfigError


@dataclass(frozen=True)
class ForwardKL:
    """KL(teacher || student): covers the teacher's modes; the usual loss on a fixed set of texts."""

    def sums(self, log_p, log_q):
        """One sum: the divergence itself."""
        return _dot(log_q.exp(), log_q - log_p)[None]

    def value(self, sums):
        """The one sum."""
        return sums[0]

    def logit_gradient(self, log_p, log_q, sums):
        """p - q."""
        return log_p.exp().sub_(log_q.exp())


@dataclass(frozen=True)
class ReverseKL:
    """KL(student || teacher): seeks a mode of the teacher; the usual loss on the student's own samples."""

    def sums(self, log_p, log_q):
        """One sum: the divergence itself."""
        return _dot(log_p.exp(), log_p - log_q)[None]

    def value(self, sums):
        """The one sum."""
        return sums[0]

    def logit_gradient(self, log_p, log_q, sums):
        """p (log p - log q - D)."""
        return (log_p - log_q).sub_(sums[0, :, None]).mul_(log_p.exp())


@dataclass(frozen=True)
class JensenShannon:
    """Generalised Jensen-Shannon: near the forward KL for a small `beta`, the reverse for one near 1."""

    beta: float
    """weight of the teacher in the mixture, above 0 and below 1"""

    def __post_init__(self) -> None:
        """Refuse the ends, where it is 0 whatever the student says.

        Raises:
            ConfigError: beta is not between 0 and 1.
        """
        if not 0 < self.beta < 1:
            raise ConfigError(
                f"beta = {self.beta}: use a number above 0 and below 1; at its ends the divergence is 0: "
                "take the forward or the reverse KL instead"
            )

    def sums(self, log_p, log_q):
        """KL(q || m) and KL(p || m)."""
        log_m = self._log_mixture(log_p, log_q)
        return torch.stack([_dot(log_q.exp(), log_q - log_m), _dot(log_p.exp(), log_p - log_m)])

    def value(self, sums):
        """beta KL(q || m) + (1 - beta) KL(p || m)."""
        return self.beta * sums[0] + (1 - self.beta) * sums[1]

    def logit_gradient(self, log_p, log_q, sums):
        """(1 - beta) p (log p - log m - KL(p || m))."""
        slope = (log_p - self._log_mixture(log_p, log_q)).sub_(sums[1, :, None])
        return slope.mul_(log_p.exp()).mul_(1 - self.beta)

    def _log_mixture(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.logaddexp(log_q + math.log(self.beta), log_p + math.log1p(-self.beta))


def sampled_reverse_kl(log_prob: Tensor, teacher_log_prob: Tensor) -> Tensor:
    """KL(student || teacher) [R] at tokens that the student drew: log p - log q, as an advantage of its own.

    The value is the estimator k1; the gradient is (log p - log q) times that of log p, whose mean over
    p is the derivative of the position's reverse KL. What the token does to later positions is left out.

    Args:
        log_prob: [R] of the student that drew them, differentiable.
        teacher_log_prob: [R] at the same temperature.
    """
    advantage = teacher_log_prob - log_prob.detach()
    return -advantage * (1 + log_prob - log_prob.detach())


def _dot(weight: Tensor, x: Tensor) -> Tensor:
    """sum over the last axis of weight x; `weight` is written over."""
    return weight.mul_(x).sum(-1)
