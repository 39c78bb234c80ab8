"""The objectives of one micro-batch: per-token losses with weights that carry global counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.algo.aggregation import weighted_sum
from mcore_rl.algo.algorithms import Algorithm, objective
from mcore_rl.algo.diagnostics import gradient_scale_sums
from mcore_rl.algo.kl import kl
from mcore_rl.algo.policy_losses import TokenLoss
from mcore_rl.algo.ratio import bounded, difference
from mcore_rl.algo.value import value_loss
from mcore_rl.parallel.context import sequence_sums
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.types import PackedBatch

MISMATCH_EDGES = torch.logspace(-8, 2, 201, dtype=torch.float64)
"""Histogram edges of |train - rollout| log-probs, 20 per decade: any layout computes the same quantile."""


@dataclass(frozen=True)
class PolicyObjective:
    """Called by model.step for every micro-batch; see `Loss` there.

    Fields of a row: `advantage`, `weight` (aggregation weight with the optimizer step's global denominators),
    `rollout_log_prob`, `ref_log_prob` where the algorithm needs a reference, `old_log_prob` except in a
    rollout's first mini-batch (ratio 1 by construction), and `age` (weight versions since the row was
    sampled) where samples may be older than the weights in training.
    """

    algorithm: Algorithm
    cp: dist.ProcessGroup | None
    """context-parallel group, over which sequence sums run"""

    def rowwise(self, batch: PackedBatch) -> bool:
        """See `Loss`; the algorithm says it."""
        return self.algorithm.rowwise(on_policy="old_log_prob" not in batch.fields)

    def __call__(self, batch: PackedBatch, head: HeadOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """-> (sum of weight * loss over this rank's rows, sums and maxima of metrics)."""
        log_prob, entropy = head
        fields = batch.fields
        old = fields.get("old_log_prob", log_prob.detach())
        arguments = [log_prob, old, fields["advantage"]]
        if self.algorithm.sequence_ratio:
            behaviour = old if self.algorithm.sequence_ratio == "old" else fields["rollout_log_prob"]
            arguments.append(self._sequence_log_ratio(batch, log_prob.detach(), behaviour))
        token = self.algorithm.loss(*arguments, **self.algorithm.loss_params)
        rollout_log_ratio = -difference(fields["rollout_log_prob"], old)
        correction = self._correction(batch, rollout_log_ratio)
        loss = objective(
            token,
            correction=correction,
            kl=self._kl(log_prob, fields),
            kl_coef=self.algorithm.kl_in_loss,
            # 0 times the entropy would have the head compute the gradient of it
            entropy=entropy if self.algorithm.entropy_coef else 0.0,
            entropy_coef=self.algorithm.entropy_coef,
        )
        total = weighted_sum(loss, fields["weight"])
        metrics = _metrics(loss, token, old, head, fields) | _behaviour(rollout_log_ratio)
        if isinstance(correction, Tensor):
            metrics["correction"] = correction.double().sum()
        return total, metrics | _gradient_scale(loss, head, fields)

    def _kl(self, log_prob: Tensor, fields) -> Tensor | float:
        if self.algorithm.kl_in_loss == 0:
            return 0.0
        old = fields.get("old_log_prob", log_prob.detach())
        return kl(self.algorithm.kl_estimator, log_prob, fields["ref_log_prob"], old)

    def _correction(self, batch: PackedBatch, log_weight: Tensor) -> Tensor | float:
        """[R] weights of the policy term by `log_weight` [R], old - rollout; 1 where none is asked."""
        used = self.algorithm.corrects
        if used is None:
            return 1.0
        if used.reads != "token":
            total, mean = self._sequence(batch, log_weight, torch.ones_like(log_weight))
            log_weight = total if used.reads == "sequence-sum" else mean
        return used.weight(log_weight, **used.params)

    def _sequence_log_ratio(self, batch: PackedBatch, log_prob: Tensor, behaviour: Tensor) -> Tensor:
        """[R] the mean log-ratio of the whole sequence that each row belongs to, over its usable rows."""
        if self.rowwise(batch):
            return torch.zeros_like(log_prob)  # to itself, and the rows may be a part of their sequence
        usable = torch.isfinite(behaviour).to(log_prob.dtype)
        return self._sequence(batch, difference(log_prob, behaviour), usable)[1]

    def _sequence(self, batch: PackedBatch, values: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
        """[R] sum of `values` over the whole sequence of each row, and its mean over the `usable` rows."""
        both = torch.stack([values, usable])
        total, count = sequence_sums(both, batch.sequence, batch.num_sequences, self.cp)
        return total[batch.sequence], (total / count.clamp(min=1))[batch.sequence]


def _metrics(loss: Tensor, token: TokenLoss, old: Tensor, head: HeadOutput, fields) -> dict[str, Tensor]:
    """Sums over this rank's rows (`max/...`: maxima), float64, to be reduced over all ranks."""
    log_prob, entropy = (x.detach().double() for x in head)
    loss = loss.detach()
    gap = difference(old, fields["rollout_log_prob"]).abs().double()
    if "age" in fields:  # engines are compared on the same weights
        gap = gap[fields["age"] == 0]
    ratio = token.ratio.double()
    return {
        "loss": weighted_sum(loss, fields["weight"]).double(),
        "abs_loss": weighted_sum(loss.abs(), fields["weight"]).double(),
        "tokens": torch.tensor(float(log_prob.numel()), dtype=torch.float64),
        "ratio": ratio.sum(),
        "clipped": token.clipped.double().sum(),
        "entropy": entropy.sum(),
        "kl_rollout": kl("k3", fields["rollout_log_prob"].double(), log_prob).sum(),
        **_reference_kl(log_prob, fields),
        "mismatch": torch.histogram(gap.cpu().clamp(1e-8, 99.0), MISMATCH_EDGES).hist,
        "max/ratio": _largest(ratio),
        "max/-ratio": _largest(-ratio),
        "max/mismatch": _largest(gap),
    }


def _behaviour(log_ratio: Tensor) -> dict[str, Tensor]:
    """How far the policy that sampled, of any age and engine, is from the old one; [R] old - rollout."""
    x = log_ratio.double()
    weight = bounded(x).exp()
    return {
        "behaviour_k1": -x.sum(),
        "behaviour_k3": (weight - 1 - x).sum(),
        "behaviour_weight": weight.sum(),
        "behaviour_weight_squared": weight.square().sum(),
        "max/behaviour": _largest(x.abs()),
    }


def _reference_kl(log_prob: Tensor, fields) -> dict[str, Tensor]:
    if "ref_log_prob" not in fields:
        return {}
    return {"kl_reference": kl("k3", log_prob, fields["ref_log_prob"].double()).sum()}


def _gradient_scale(loss: Tensor, head: HeadOutput, fields) -> dict[str, Tensor]:
    """Sums of algo.diagnostics, `on_policy` ones of the mini-batch to which the soft bound applies.

    The derivative stops at log_prob: it runs through a few elementwise operations per row, not the model.
    """
    (coefficient,) = torch.autograd.grad(loss.sum(), head.log_prob, retain_graph=True)
    sums = gradient_scale_sums(*head, fields["advantage"], coefficient)
    on_policy = "old_log_prob" not in fields and "age" not in fields
    return {"head": sums, **({"head/on_policy": sums} if on_policy else {})}


def _largest(x: Tensor) -> Tensor:
    return x.max() if x.numel() else x.new_tensor(-torch.inf)


@dataclass(frozen=True)
class ValueObjective:
    """The critic's loss; called by model.step as PolicyObjective is.

    Fields of a row: `return` and `old_value`, from before the first update, and the policy's `weight`.
    """

    clip: float | None
    """values may move this far from the old ones before the gradient is cut; None does not clip"""
    coef: float = 1.0
    """factor of the loss"""

    def rowwise(self, batch: PackedBatch) -> bool:
        """No: a critic answers with values, not through the head."""
        return False

    def __call__(self, batch: PackedBatch, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """values [R] -> (sum of coef * weight * loss over this rank's rows, metric sums)."""
        fields = batch.fields
        token = value_loss(values, fields["old_value"], fields["return"], clip=self.clip)
        loss = weighted_sum(token.loss, fields["weight"])
        return self.coef * loss, {
            "loss": loss.double(),
            "tokens": torch.tensor(float(values.numel()), dtype=torch.float64),
            "clipped": token.clipped.double().sum(),
        }
