"""Golden cases of rollouts with several segments: trajectories.npz.

Legend: R rollouts, S segments (training sequences), T positions of a segment. A rollout counts once, however
many segments it has, and a void one (its environment or grader failed) not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from mcore_rl.algo import advantages, losses
from mcore_rl.algo.advantages import offsets_of
from mcore_rl.algo.losses import difference
from mcore_rl.algo.rows import Rows, TokenLoss
from mcore_rl.verify.golden.inputs import GoldenInputs, Outputs

INPUTS = frozenset(
    {"rollout_group", "rollout_reward", "rollout_void", "segment_rollout", "lengths", "mask", "H", "W", "y"}
    | {"temperature", "L_max", "gamma", "lam", "kl_coef", "old_logp", "ref_logp", "values"}
    | {"n_tokens", "n_rollouts"}
)


@dataclass(frozen=True)
class Trajectories:
    """The segments as a batch of their own, and what belongs to rollouts."""

    segments: GoldenInputs
    """its batch is [S, T]"""
    rollout: Tensor
    """[S] int64 into [0, R)"""
    void: Tensor
    """[R] bool"""
    tokens: Tensor
    """[R] trained tokens over all segments; a void rollout has none"""

    @classmethod
    def of(cls, p: GoldenInputs) -> Trajectories:
        """The arrays of trajectories.npz in the precision of `p`."""
        segments = replace(p, files={"batch": p.files["trajectories"]})
        rollout, void = segments.tensor("segment_rollout"), segments.tensor("rollout_void")
        counted = torch.zeros(len(void), dtype=torch.int64).index_add(0, rollout, segments.lengths)
        return cls(segments, rollout, void, torch.where(void, 0, counted))

    @property
    def trained(self) -> Tensor:
        """[S, T] bool: what is trained, no token of a void rollout among it."""
        return self.segments.mask & ~self.void[self.rollout, None]

    @property
    def alive(self) -> int:
        """Rollouts that count."""
        return int((~self.void).sum())

    @property
    def rewards(self) -> Tensor:
        """[R] float64"""
        return self.segments.tensor("rollout_reward").double()

    def advantage(self, of: Callable[..., Tensor], **params: str) -> Tensor:
        """[R] from the rewards of the rollouts that are alive, 0 for the others."""
        alive, groups = ~self.void, self.segments.tensor("rollout_group")
        rewards = self.rewards[alive]
        statistics = advantages.group_statistics(groups[alive].tolist(), rewards.tolist())
        return torch.zeros_like(self.rewards).masked_scatter(alive, of(rewards, statistics, **params))

    def expand(self, rollouts: Tensor) -> Tensor:
        """[R] -> [S, T]"""
        return self.segments.expand(rollouts[self.rollout])

    def unpack(self, rows: Tensor) -> Tensor:
        """[rows] of trained tokens, rollout after rollout -> [S, T], 0 elsewhere."""
        empty = torch.zeros(self.trained.shape, dtype=self.segments.dtype)
        return empty.masked_scatter(self.trained, rows.to(self.segments.dtype))


# --- numbers ----------------------------------------------------------------------------------------------


STD = {"grpo": "group", "mean_only": "none", "liteppo": "batch"}


def _advantage(t: Trajectories, name: str) -> Tensor:
    if name == "rloo":
        return t.advantage(advantages.leave_one_out)
    return t.advantage(advantages.group_normalized, std=STD[name])


def _weight(t: Trajectories, name: str) -> Tensor:
    weight = losses.aggregation_weight(
        cast(losses.Aggregation, name),
        t.expand(t.tokens),
        tokens=int(t.tokens.sum()),
        sequences=t.alive,
        max_length=t.segments.scalar("L_max"),
    )
    return weight * t.trained


def _gae(t: Trajectories, name: str) -> Tensor:
    """Over the trained tokens of a rollout, segment after segment."""
    offsets, numbers = offsets_of(t.tokens), {key: t.segments.scalar(key) for key in ("gamma", "lam")}
    old, ref, values = (t.segments.tensor(key)[t.trained] for key in ("old_logp", "ref_logp", "values"))
    rewards = advantages.token_rewards(t.rewards, old, ref, offsets, kl_coef=t.segments.scalar("kl_coef"))
    advantage, followed = advantages.gae(rewards, values, offsets, **numbers)
    if name == "whitened":
        advantage = advantages.whiten(advantage, advantages.Spread.of_rows(advantage))
    return t.unpack(followed if name == "returns" else advantage)


# --- losses -----------------------------------------------------------------------------------------------

Loss = Callable[[Rows], TokenLoss]
LOSSES: Mapping[str, tuple[Loss, str, str]] = {
    "grpo": (losses.ppo, "grpo", "seq-mean-token-mean"),
    "dapo-token-mean": (losses.ppo, "grpo", "token-mean"),
    "gspo": (losses.gspo, "grpo", "seq-mean-token-mean"),
    "sapo": (losses.sapo, "grpo", "seq-mean-token-mean"),
    "liteppo": (losses.ppo, "liteppo", "token-mean"),
    "drgrpo": (losses.ppo, "mean_only", "seq-mean-token-sum-norm"),
    "ppo_gae": (losses.ppo, "whitened", "token-mean"),
}
"""case -> its loss, the name of its advantage, its aggregation"""


def _loss(t: Trajectories, name: str) -> Outputs:
    """The sequence of a sequence ratio is a segment: its tokens were scored in one context."""
    loss, of, how = LOSSES[name]
    p = t.segments
    advantage = _gae(t, of) if of == "whitened" else t.expand(_advantage(t, of))
    weight = _weight(t, how)
    old = p.tensor("old_logp")

    def loss_of(log_prob: Tensor, entropy: Tensor) -> Tensor:
        rows = Rows.of(log_prob, entropy, old=old, rollout=old, advantage=advantage)
        ratio = p.expand(p.sequence_mean(difference(log_prob.detach(), old)))
        token = loss(replace(rows, extras={"sequence_log_ratio": ratio}))
        return losses.weighted_sum(token.loss, weight)

    return p.gradients(loss_of)


def _on(case: Callable[..., Tensor | Outputs], *names: str) -> Callable[[GoldenInputs], Tensor | Outputs]:
    return lambda p: case(Trajectories.of(p), *names)


CASES: Mapping[str, Callable[[GoldenInputs], Tensor | Outputs]] = {
    **{f"adv/{name}": _on(_advantage, name) for name in ("rloo", *STD)},
    **{
        f"weight/{name}": _on(_weight, name)
        for name in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
    },
    **{f"gae/{name}": _on(_gae, name) for name in ("advantages", "returns", "whitened")},
    **{f"loss/{name}": _on(_loss, name) for name in LOSSES},
}
