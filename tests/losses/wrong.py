"""Losses that break the contract, each in one way."""

from __future__ import annotations

import torch
from torch import Tensor

from mcore_rl.algo.losses import log_ratio
from mcore_rl.algo.metrics import Mean, Total
from mcore_rl.algo.rows import Rows, TokenLoss, reads


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * grad


def gradient(rows: Rows) -> TokenLoss:
    """Its gradient is twice that of its value."""
    return TokenLoss(-rows.advantage * _Doubled.apply(log_ratio(rows.log_prob, rows.old).exp()))  # type: ignore


def mixed(rows: Rows) -> TokenLoss:
    """Every row is compared with the mean of the others that happen to be beside it."""
    ratio = log_ratio(rows.log_prob, rows.old).exp()
    return TokenLoss(-rows.advantage * (ratio - ratio.mean()))


def mixed_constant(rows: Rows) -> TokenLoss:
    """The same with a constant, which no derivative shows."""
    return TokenLoss(-(rows.advantage - rows.advantage.mean()) * rows.log_prob)


def undeclared(rows: Rows) -> TokenLoss:
    """It reads the whole sequence and does not say so: in fused mode there would only be a part of it."""
    return TokenLoss(-rows.advantage * rows.sequence_log_ratio * rows.log_prob)


def scalar(rows: Rows) -> TokenLoss:
    """It sums by itself, without the weights of the optimizer step."""
    return TokenLoss((-rows.advantage * rows.log_prob).sum())


def cut_off(rows: Rows) -> TokenLoss:
    """No gradient comes back from it."""
    return TokenLoss((-rows.advantage * rows.log_prob).detach())


def without_metrics(rows: Rows) -> TokenLoss:
    """It says that there are no metrics in a way of its own."""
    return TokenLoss(-rows.advantage * rows.log_prob, None)  # type: ignore


def valueless(rows: Rows) -> TokenLoss:
    """It logs nothing under a name."""
    return TokenLoss(-rows.advantage * rows.log_prob, {"own/mean": Mean(None)})


def nameless(rows: Rows) -> TokenLoss:
    """It numbers its metrics."""
    return TokenLoss(-rows.advantage * rows.log_prob, {3: Mean(rows.advantage)})  # type: ignore


def weights_for_bools(rows: Rows) -> TokenLoss:
    """It says which rows count by numbers."""
    return TokenLoss(-rows.advantage * rows.log_prob, {"own/mean": Mean(rows.advantage, rows.advantage)})


def renumbered(rows: Rows) -> TokenLoss:
    """Its metric would take the place of the step's number."""
    return TokenLoss(-rows.advantage * rows.log_prob, {"step": Mean(rows.advantage)})


def reward(rows: Rows) -> TokenLoss:
    """Its metric would take the place of the mean reward."""
    return TokenLoss(-rows.advantage * rows.log_prob, {"reward/mean": Mean(rows.advantage)})


def number(rows: Rows) -> Tensor:
    """It returns a tensor."""
    return -rows.advantage * rows.log_prob


def metric(rows: Rows) -> TokenLoss:
    """It logs one number rather than one per row."""
    return TokenLoss(-rows.advantage * rows.log_prob, {"own/mean": Mean(rows.advantage.mean())})


@reads("sequence_log_ratio")
def declared(rows: Rows) -> TokenLoss:
    """It says so: nothing is wrong with it."""
    return TokenLoss(-rows.advantage * rows.sequence_log_ratio.exp() * rows.log_prob)


def unset(rows: Rows, *, strength: float) -> TokenLoss:
    """It has a parameter without a default."""
    return TokenLoss(-strength * rows.advantage * rows.log_prob)


def taken(rows: Rows, *, whiten: bool = True) -> TokenLoss:
    """It has a parameter of every algorithm's."""
    return TokenLoss(-rows.advantage * rows.log_prob)


def known(rows: Rows) -> TokenLoss:
    """It logs under a name that every run logs."""
    return TokenLoss(-rows.advantage * rows.log_prob, {"entropy": Mean(rows.entropy)})


def hidden(rows: Rows) -> TokenLoss:
    """It logs under a name that the objective uses, although nothing is logged by it."""
    return TokenLoss(-rows.advantage * rows.log_prob, {"loss/scale": Mean(rows.advantage)})


def broken_total(rows: Rows) -> TokenLoss:
    """Its loss is sound, and a sum that it measures is none."""
    return TokenLoss(-rows.advantage * rows.log_prob, {"own/total": Total(rows.advantage * torch.nan)})
