"""The objectives of one micro-batch: per-token losses with weights that carry global counts, and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.algo.advantages import sums_ahead
from mcore_rl.algo.algorithms import Algorithm, objective
from mcore_rl.algo.corrections import Reads, correction_weight
from mcore_rl.algo.losses import bounded, kl, value_loss, weighted_sum
from mcore_rl.algo.metrics import Key, Max, Mean, Metric, Quantile, gradient_scale_sums, parts_of
from mcore_rl.algo.readings import readings
from mcore_rl.algo.rows import Rows, TokenLoss
from mcore_rl.errors import ConfigError
from mcore_rl.log import NON_FINITE
from mcore_rl.metric_names import meaning_of
from mcore_rl.parallel.context import sequence_grid, sequence_maxima, sequence_sums
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.training.metrics import EffectiveSampleSize, HeadGradient, HeadRatio, LossTotal, Scale
from mcore_rl.types import PackedBatch

Parts = Mapping[Key, Tensor]
"""what one call of an objective measured, to be reduced over calls and ranks"""


@dataclass(frozen=True)
class PolicyObjective:
    """Called by model.step for every micro-batch; see `Loss` there.

    Fields of a row: `advantage`, `weight` (aggregation weight with the optimizer step's global denominators),
    `rollout_log_prob`, `ref_log_prob` where the algorithm needs a reference, `old_log_prob` except in a
    rollout's first mini-batch (ratio 1 by construction), `age` (weight versions since the row was sampled)
    where samples may be older than the weights in training, and where the algorithm asks for it `marked`
    (rows.marks), `place` (rows.ahead), `correction_scale` (one over the mean correction), `nll_weight` (one
    over the tokens of positive samples, or 0) and `observed` (the weight of a token between the turns, which
    is no row of the policy's loss; 0 of the others).
    """

    algorithm: Algorithm
    cp: dist.ProcessGroup | None
    """context-parallel group, over which sequence sums run"""

    def rowwise(self, batch: PackedBatch) -> bool:
        """Say what the algorithm says; see `Loss`."""
        return self.algorithm.rowwise(on_policy="old_log_prob" not in batch.fields)

    def __call__(self, batch: PackedBatch, head: HeadOutput) -> tuple[Tensor, Callable[[], Parts]]:
        """Return the sum of weight * loss over this rank's rows, and what gives the parts of the metrics."""
        fields = batch.fields
        rows = self._rows(batch, head)
        correction = self._correction(batch, rows)
        token = self.algorithm.loss(self._for_loss(batch, rows, correction), **self.algorithm.loss_params)
        check_answer(token, rows)
        loss = objective(
            rows,
            token,
            correction=correction,
            kl=self._kl(rows),
            kl_coef=self.algorithm.kl_in_loss,
            # 0 times the entropy would have the head compute the gradient of it
            entropy=rows.entropy if self.algorithm.entropy_coef else 0.0,
            entropy_coef=self.algorithm.entropy_coef,
            likelihood=self._likelihood(fields),
        )

        def measure() -> Parts:
            metrics = _metrics(rows, loss, fields) | _gradient_scale(rows, loss, fields)
            if "observed" in fields:
                observed = fields["observed"] > 0
                metrics["observation/nll"] = Mean(-rows.log_prob.detach(), observed, of_all_rows=True)
            if isinstance(correction, Tensor):
                metrics["correction/mean"] = Mean(correction)
            if taken := metrics.keys() & token.metrics.keys():  # those that are not logged by this name, too
                raise ConfigError(f"the loss logs {min(taken)!r}, which every run logs; give it another name")
            return parts_of({**metrics, **token.metrics}, rows.usable, torch.ones_like(rows.usable))

        total = weighted_sum(loss, fields["weight"])
        if "observed" in fields:
            total = total - self.algorithm.observation_nll * (fields["observed"] * rows.log_prob).sum()
        return total, measure

    def _rows(self, batch: PackedBatch, head: HeadOutput) -> Rows:
        """Everything that was recorded for these rows, the reference's log-prob where there is one."""
        fields = batch.fields
        return Rows.of(
            head.log_prob,
            head.entropy,
            old=fields.get("old_log_prob"),
            rollout=fields["rollout_log_prob"],
            advantage=fields["advantage"],
            reference=fields.get("ref_log_prob"),
            sequence_tokens=fields.get("sequence_tokens"),
        )

    def _for_loss(self, batch: PackedBatch, rows: Rows, correction: Tensor | float) -> Rows:
        """The rows with what the loss declared, and nothing beside it."""
        extras = readings(
            self.algorithm.loss,
            rows,
            self.algorithm.loss_params,
            lambda values, among: self._sequence(batch, values, among),
            kept=correction != 0 if isinstance(correction, Tensor) else None,
            marked=batch.fields["marked"] > 0 if "marked" in batch.fields else None,
            ahead=lambda values, discount: self._ahead(batch, values, discount),
        )
        return replace(rows, extras=extras)

    def _likelihood(self, fields: Mapping[str, Tensor]) -> Tensor | float:
        """[R] what -log_prob is multiplied by, beside the policy term; 0 where no sample is learnt by it."""
        if self.algorithm.positive_nll == 0:
            return 0.0
        weight = fields["weight"]
        ratio = torch.where(weight != 0, fields["nll_weight"] / weight, 0.0)
        return self.algorithm.positive_nll * ratio

    def _kl(self, rows: Rows) -> Tensor | float:
        if self.algorithm.kl_in_loss == 0:
            return 0.0
        used = self.algorithm
        return kl(used.kl_estimator, rows.log_prob, rows.reference, rows.old, cap=used.kl_cap)

    def _correction(self, batch: PackedBatch, rows: Rows) -> Tensor | float:
        """[R] weights of the policy term; 1 where none is asked."""
        used, rules = self.algorithm.corrects, self.algorithm.rules
        if used is None and not rules:
            return 1.0

        def reduce(values: Tensor, reads: Reads) -> Tensor:
            if reads == "sequence-max":
                among = torch.where(rows.usable, values, 0.0)
                largest = sequence_maxima(among, batch.sequence, batch.num_sequences, self.cp)
                return largest[batch.sequence]
            total, mean = self._sequence(batch, values, rows.usable)
            return total if reads == "sequence-sum" else mean

        weight = correction_weight(used, rules, rows.old, rows.rollout, reduce)
        return weight * batch.fields["correction_scale"] if self.algorithm.correction_normalized else weight

    def _ahead(self, batch: PackedBatch, values: Tensor, discount: float) -> Tensor:
        """[R] the discounted sum of `values` over each row and those that follow in its sequence."""
        at = (batch.sequence, batch.fields["place"])
        grid = sequence_grid(values, *at, (batch.num_sequences, batch.max_seqlen), self.cp)
        return sums_ahead(grid, discount)[at]

    def _sequence(self, batch: PackedBatch, values: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
        """[R] sum and mean of `values` over the rows `among` those of the whole sequence of each row."""
        if self.rowwise(batch):  # a log-ratio to itself, and the rows may be a part of their sequence
            return (zeros := torch.zeros_like(values)), zeros
        both = torch.stack([torch.where(among, values, 0.0), among.to(values.dtype)])
        total, count = sequence_sums(both, batch.sequence, batch.num_sequences, self.cp)
        return total[batch.sequence], (total / count.clamp(min=1))[batch.sequence]


OF_LOSSES = frozenset({"ratio/mean", "ratio/max", "ratio/min", "clip/fraction"})
"""names that algo.losses.ratio_metrics gives, for any loss with an importance ratio"""
RESERVED = frozenset({"step", NON_FINITE})


def check_answer(token: TokenLoss, rows: Rows) -> None:
    """Raise ConfigError unless a loss, perhaps of the user's own, answered what the contract says."""
    if not isinstance(token, TokenLoss):
        raise ConfigError(f"the loss returned {type(token).__name__}; return TokenLoss(loss, metrics)")
    if not isinstance(token.loss, Tensor) or token.loss.shape != rows.log_prob.shape:
        raise ConfigError(f"the loss returned {_kind_of(token.loss)} as loss; return one value per row")
    if rows.log_prob.requires_grad and not token.loss.requires_grad:
        raise ConfigError(
            "the loss does not follow from rows.log_prob, so that nothing would be learnt; leave out the "
            "detach(), or the no_grad, that cuts it off"
        )
    if not isinstance(token.metrics, Mapping):
        raise ConfigError(
            f"the loss returned {_kind_of(token.metrics)} as metrics; return a dict of types of algo.metrics"
        )
    for name, metric in token.metrics.items():
        _check_metric(name, metric, rows)


def _check_metric(name: object, metric: object, rows: Rows) -> None:
    if not isinstance(name, str):
        raise ConfigError(f"the loss logs a metric named {name!r}; name it with a string")
    if name in RESERVED or (name not in OF_LOSSES and meaning_of(name) is not None):
        raise ConfigError(f"the loss logs {name!r}, which every run logs; give it another name")
    if not isinstance(metric, Metric):
        raise ConfigError(f"the loss logs {name!r} as {type(metric).__name__}; use a type of algo.metrics")
    for what, values in (("values", metric.values), ("among", metric.among)):
        if values is None and what == "among":
            continue
        if not isinstance(values, Tensor) or values.shape != rows.log_prob.shape:
            raise ConfigError(f"the loss logs {name!r} with {_kind_of(values)} as {what}; give one per row")
    if metric.among is not None and metric.among.dtype != torch.bool:
        raise ConfigError(
            f"the loss logs {name!r} among {metric.among.dtype}; say with bools which rows count"
        )


def _kind_of(value: object) -> str:
    """What a wrong answer is, in words."""
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _metrics(rows: Rows, loss: Tensor, fields: Mapping[str, Tensor]) -> dict[str, Metric]:
    """What is logged whatever the loss; a metric is one line."""
    log_prob, weight = rows.log_prob.detach().double(), fields["weight"]
    weighted = torch.where(weight != 0, weight * loss.detach(), 0.0)
    gap = rows.old - rows.rollout
    sampled_rows = fields["observed"] == 0 if "observed" in fields else None
    now = fields["age"] == 0 if "age" in fields else None  # engines are compared on the same weights
    behaviour = gap.double()
    sampled = bounded(behaviour).exp()
    found: dict[str, Metric] = {
        "loss/policy": LossTotal(weighted),
        "loss/scale": Scale(weighted.abs()),
        "masked/fraction": Mean(~rows.usable, sampled_rows, of_all_rows=True),
        "entropy": Mean(rows.entropy),
        "kl/rollout": Mean(kl("k3", rows.rollout.double(), log_prob)),
        "mismatch/max_abs": Max(gap.abs(), now),
        "mismatch/p999": Quantile(gap, now, fraction=0.999),
        "behaviour/k1": Mean(-behaviour),
        "behaviour/k3": Mean(sampled - 1 - behaviour),
        "behaviour/ess": EffectiveSampleSize(sampled),
        "behaviour/max_abs": Max(behaviour.abs()),
    }
    if "reference" in rows.extras:
        found["kl/reference"] = Mean(kl("k3", log_prob, rows.reference.double()))
    return found


def _gradient_scale(rows: Rows, loss: Tensor, fields: Mapping[str, Tensor]) -> dict[str, Metric]:
    """The sums of metrics.gradient_scale_sums, `on_policy` ones of what the soft bound applies to.

    The derivative stops at log_prob: it runs through a few elementwise operations per row, not the model.
    """
    (coefficient,) = torch.autograd.grad(loss.sum(), rows.log_prob, retain_graph=True)
    trained = torch.where(rows.usable, rows.advantage, 0.0)
    each = (rows.log_prob, rows.entropy, trained, coefficient)
    if "observed" in fields:  # the scale is one of what was sampled
        each = tuple(values[fields["observed"] == 0] for values in each)
    sums = gradient_scale_sums(*each)
    found: dict[str, Metric] = {"head": HeadGradient(sums)}
    if "old_log_prob" not in fields and "age" not in fields:
        found["head/grad_ratio_on_policy"] = HeadRatio(sums)
    return found


@dataclass(frozen=True)
class ValueObjective:
    """The critic's loss; model.step calls it as it calls PolicyObjective.

    Fields of a row: `return` and `old_value`, from before the first update, and the policy's `weight`.
    """

    clip: float | None
    """values may move this far from the old ones before the gradient is cut; None does not clip"""
    coef: float = 1.0
    """factor of the loss"""

    def rowwise(self, batch: PackedBatch) -> bool:
        """No: a critic answers with values, not through the head."""
        return False

    def __call__(self, batch: PackedBatch, values: Tensor) -> tuple[Tensor, Callable[[], Parts]]:
        """Return the sum of coef * weight * loss over this rank's rows of `values` [R], and its metrics."""
        fields = batch.fields
        token = value_loss(values, fields["old_value"], fields["return"], clip=self.clip)
        weight = fields["weight"]

        def measure() -> Parts:
            weighted = torch.where(weight != 0, weight * token.loss.detach(), 0.0)
            metrics: dict[str, Metric] = {
                "loss/value": LossTotal(weighted),
                "loss/scale": Scale(weighted.abs()),
                "value/clip_fraction": Mean(token.clipped),
            }
            everything = torch.ones_like(token.clipped)
            return parts_of(metrics, everything, everything)

        return self.coef * weighted_sum(token.loss, weight), measure
