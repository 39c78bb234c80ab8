"""Advantages per token: KL in the reward, generalised advantage estimation, whitening.

Flat rows: the UNMASKED response tokens of all sequences end to end, sequence i at [offsets[i], offsets[i+1]).
Masked tokens (tool output, padding) are simply absent, so nothing resets or leaks at them, and a sequence may
have no row. Everything is float64. R rows, N sequences, P rewards of turns. Under
context parallelism these run on whole sequences, before the split.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mcore_rl.algo.advantages import Spread
from mcore_rl.algo.ratio import difference


def token_rewards(
    scores: Float[Tensor, " N"],
    old_log_prob: Float[Tensor, " R"],
    ref_log_prob: Float[Tensor, " R"],
    offsets: Int[Tensor, " N_plus_1"],
    *,
    kl_coef: float,
) -> Float[Tensor, " R"]:
    """-kl_coef (old - ref) on every token, plus the score on the LAST row of its sequence.

    Source: InstructGPT, arXiv 2203.02155 section 3.5. The KL is k1 without gradient, the right estimator in a
    reward (kl.py).
    """
    rewards = -kl_coef * difference(old_log_prob.detach().double(), ref_log_prob.detach().double())
    scored = offsets.diff() > 0
    return rewards.index_add(0, offsets[1:][scored] - 1, scores.double()[scored])


def add_turn_rewards(
    rewards: Float[Tensor, " R"], rows: Int[Tensor, " P"], turn_rewards: Float[Tensor, " P"]
) -> Float[Tensor, " R"]:
    """The reward of each turn, added on the row of its last token.

    The return of a token then has the rewards of its own turn and of later ones only. A sample whose reward
    is added here has score 0 in `token_rewards`.
    """
    return rewards.index_add(0, rows, turn_rewards.double())


def gae(
    rewards: Float[Tensor, " R"],
    values: Float[Tensor, " R"],
    offsets: Int[Tensor, " N_plus_1"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """(advantages, returns), arXiv 1506.02438 eq. 16: A_t = delta_t + gamma lam A_next, returns = A + V.

    delta_t = R_t + gamma V_next - V_t, and V after the last row is 0. With values 0 and lam 1 the advantage
    is the discounted return, as REINFORCE++ (2501.03262) takes it.
    """
    lengths = offsets.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    steps = torch.arange(longest, device=offsets.device)
    live = steps < lengths[:, None]
    padded_values = values.new_zeros(len(lengths), longest + 1, dtype=torch.float64)
    padded_values[:, :-1][live] = values.detach().double()
    delta = torch.zeros_like(padded_values)
    delta[:, :-1][live] = rewards.double()
    delta[:, :-1] += gamma * padded_values[:, 1:] - padded_values[:, :-1]
    for t in range(longest - 2, -1, -1):
        delta[:, t] += gamma * lam * delta[:, t + 1]
    advantages = delta[:, :-1][live]
    return advantages, advantages + values.detach().double()


def whiten(values: Float[Tensor, "*shape"], tokens: Spread) -> Float[Tensor, "*shape"]:
    """(x - mean) / sqrt(variance + 1e-8), by the mean and the variance (ddof 1) of `tokens`.

    `tokens` are all unmasked tokens of the global batch. Fewer than two give nothing to scale by, and the
    values come back as they are.
    """
    if tokens.size < 2:
        return values
    return (values - tokens.mean) / (tokens.variance() + 1e-8) ** 0.5
