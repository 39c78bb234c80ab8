"""GAE with another lambda for the critic's returns than for the policy's advantages."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from mcore_rl.algo.advantages import estimate, gae


def gae_two_lambdas(
    rewards: Float[Tensor, " R"],
    values: Float[Tensor, " R"],
    offsets: Int[Tensor, " N_plus_1"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    lam_critic: float = 1.0,
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """`gae` with `lam` for the advantages and `lam_critic` for the returns: VC-PPO, arXiv 2503.01491."""
    advantages, _ = gae(rewards, values, offsets, gamma=gamma, lam=lam)
    return advantages, gae(rewards, values, offsets, gamma=gamma, lam=lam_critic)[1]


def gae_by_length(
    rewards: Float[Tensor, " R"],
    values: Float[Tensor, " R"],
    offsets: Int[Tensor, " N_plus_1"],
    *,
    gamma: float = 1.0,
    length_factor: float = 0.05,
    lam_critic: float = 1.0,
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """`gae` with lambda 1 - 1 / (length_factor l) for a response of l tokens: VAPO, arXiv 2504.05118.

    At least 0: a response of fewer than 1 / length_factor tokens has one-step advantages.
    """
    lam = (1 - 1 / (length_factor * offsets.diff().double()).clamp(min=1e-9)).clamp(min=0.0)
    advantages, _ = estimate(rewards, values, offsets, gamma, lam)
    return advantages, gae(rewards, values, offsets, gamma=gamma, lam=lam_critic)[1]


def of_turns(
    found: tuple[Float[Tensor, " P"], Float[Tensor, " P"]], tokens: Int[Tensor, " P"]
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """(advantages, returns) of P turns, spread to the `tokens` of each."""
    return found[0].repeat_interleave(tokens), found[1].repeat_interleave(tokens)
