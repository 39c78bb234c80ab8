"""The weight of the policy term against the mismatch with the policy that sampled.

It is that of an entry of losses.CORRECTIONS, times that of rules.

A rule rejects, it does not weigh: it is read off a distance of the old policy from the one that sampled, of
each token or of the whole sequence. Several hold together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mcore_rl.algo.losses import LOG_RATIO_BOUND, Correction
from mcore_rl.algo.masked_losses import bernoulli_kl
from mcore_rl.errors import ConfigError

Reads = Literal["token", "sequence-sum", "sequence-mean", "sequence-max"]
Reduce = Callable[[Tensor, Reads], Tensor]
"""(values [R], over what) -> [R] the same of the whole sequence of each row, over its usable rows"""
DISTANCES = ("k1", "k2", "k3", "binary-kl")
READS: tuple[Reads, ...] = ("token", "sequence-sum", "sequence-mean", "sequence-max")
_FORM = "READS-DISTANCE:BOUND, such as token-k1:0.5..2 or sequence-max-k2:1.5"


@dataclass(frozen=True)
class Rejection:
    """What is rejected: a token, or all of a sequence, whose `distance` is outside the bounds."""

    reads: Reads
    distance: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> Rejection:
        """`READS-DISTANCE:BOUND`; of k1 the bound is LOW..HIGH, and one of the weight e^k1.

        Raises:
            ConfigError: what cannot be read, or leaves nothing.
        """
        place = f"algorithm.params.rejection: {text!r}"
        name, _, bound = text.partition(":")
        reads: Reads | None = next((r for r in READS if name.startswith(f"{r}-")), None)
        distance = "" if reads is None else name.removeprefix(f"{reads}-")
        if reads is None or distance not in DISTANCES:
            raise ConfigError(
                f"{place} is not {_FORM}; READS is one of {', '.join(READS)}, DISTANCE one of "
                f"{', '.join(DISTANCES)}"
            )
        if reads == "sequence-max" and distance == "k1":
            raise ConfigError(f"{place}: k1 has a sign, and its largest says nothing of the smallest; use k2")
        ends = bound.split("..") if distance == "k1" else ["0", bound]
        try:
            low, high = map(float, ends)
        except ValueError:
            raise ConfigError(f"{place}: the bound is a number, and LOW..HIGH of k1 ({_FORM})") from None
        if not (0 <= low < high < float("inf")):
            raise ConfigError(f"{place}: {bound} leaves nothing; set finite bounds of 0 or more in order")
        return cls(reads, distance, low, high)

    def keeps(self, values: Float[Tensor, " R"]) -> Bool[Tensor, " R"]:
        """Whether each row's distance, reduced as the rule reads it, is within the bounds."""
        if self.distance == "k1":
            values = values.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
        return (values >= self.low) & (values <= self.high)


@functools.cache
def parse_rules(text: str) -> tuple[Rejection, ...]:
    """Rules with commas between them; none where the text is empty."""
    return tuple(Rejection.parse(part.strip()) for part in text.split(",")) if text.strip() else ()


def distance(name: str, old: Float[Tensor, " R"], rollout: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """How far the old policy is from the one that sampled, by token, with w = e^(old - rollout).

    k1 = log w, k2 = (log w)^2 / 2, k3 = w - 1 - log w (an unbiased KL(rollout || old)), and binary-kl the
    larger of both KLs of "this token or another" (KPop, Ring 2026).
    """
    log_w = old.double() - rollout.double()
    match name:
        case "k1":
            return log_w
        case "k2":
            return log_w.square() / 2
        case "k3":
            return torch.expm1(log_w.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)) - log_w
    return torch.maximum(bernoulli_kl(old, rollout), bernoulli_kl(rollout, old))


def correction_weight(
    used: Correction | None,
    rules: tuple[Rejection, ...],
    old: Float[Tensor, " R"],
    rollout: Float[Tensor, " R"],
    reduce: Reduce,
) -> Float[Tensor, " R"]:
    """The weight of `used`, 0 where a rule rejects. Old and rollout log-probs are equal where not usable."""
    log_w = old - rollout
    weight = torch.ones_like(log_w)
    if used is not None:
        weight = used.weight(log_w if used.reads == "token" else reduce(log_w, used.reads), **used.params)
    for rule in rules:
        values = distance(rule.distance, old, rollout)
        values = values if rule.reads == "token" else reduce(values, rule.reads)
        weight = torch.where(rule.keeps(values), weight, 0.0)
    return weight
