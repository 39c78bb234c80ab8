"""The objective of whole sequences that a micro-batch holds together: preferences, reward models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.algo.metrics import Key, Mean, Metric
from mcore_rl.algo.sequences import OfSequences, SequenceLoss, Sequences
from mcore_rl.parallel.context import sequence_sums
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.training.metrics import LossTotal, Scale
from mcore_rl.training.objective import Parts
from mcore_rl.types import PackedBatch


@dataclass(frozen=True)
class SequenceObjective:
    """Called by model.step for every micro-batch; see `Loss` there.

    A row has the fields that the loss names, each equal over the rows of a sequence. The sums over a sequence
    that several context-parallel ranks share run outside autograd, and the derivative of the loss in them is
    the coefficient of every row: no collective has a backward pass.
    """

    loss: OfSequences
    cp: dist.ProcessGroup | None
    """context-parallel group"""
    total: str = "loss/policy"
    """the metric that is the loss"""

    def rowwise(self, batch: PackedBatch) -> bool:
        """No: the derivative at a row follows from the whole sequence, and from the other of its pair."""
        return False

    def __call__(self, batch: PackedBatch, output: HeadOutput | Tensor) -> tuple[Tensor, Callable[[], Parts]]:
        """Return the rows' log-probs (or scores) times their coefficients, and the parts of the metrics."""
        values = output if isinstance(output, Tensor) else output.log_prob
        found = self._whole(batch, values.detach().double())
        leaf = found.value.requires_grad_()
        with torch.enable_grad():
            loss = self.loss(replace(found, value=leaf))
            (slope,) = torch.autograd.grad(loss.weighted.sum() + 0 * leaf.sum(), leaf)
        total = (slope[batch.sequence].to(values.dtype) * values).sum()
        return total, partial(self._parts, output, loss)

    def _parts(self, output: HeadOutput | Tensor, loss: SequenceLoss) -> Parts:
        """What is logged of one micro-batch."""
        values = output if isinstance(output, Tensor) else output.log_prob
        counts = self.cp is None or self.cp.rank() == 0  # every rank of the group has all units
        units = torch.full(loss.weighted.shape, counts, dtype=torch.bool, device=values.device)
        parts = parts_of(loss, self.total, units)
        if not isinstance(output, Tensor):
            entropy = Mean(output.entropy)
            parts[Key("entropy", entropy.kind)] = entropy.part(torch.ones_like(values, dtype=torch.bool))
        return parts

    def _whole(self, batch: PackedBatch, values: Tensor) -> Sequences:
        """[B] what the loss reads, over all ranks that hold a part of these sequences."""
        names = [name for name in batch.fields if name != "sample"]
        rows = [values, torch.ones_like(values), *(batch.fields[name].double() for name in names)]
        sums = sequence_sums(torch.stack(rows), batch.sequence, batch.num_sequences, self.cp)
        value, tokens, *rest = sums
        count = tokens.clamp(min=1)
        means = {name: total / count for name, total in zip(names, rest, strict=True)}
        return Sequences(value, tokens, means)


def parts_of(loss: SequenceLoss, total: str, units: Tensor) -> dict[Key, Tensor]:
    """The parts of the metrics of `units` [U], of which each that is true counts."""
    weighted = loss.weighted.detach()
    metrics: Mapping[str, Metric] = {
        total: LossTotal(weighted),
        "loss/scale": Scale(weighted.abs()),
        **loss.metrics,
    }
    return {Key(name, metric.kind): metric.part(units) for name, metric in metrics.items()}


def measured(
    loss: OfSequences, values: Sequence[float], tokens: Sequence[int], fields: Mapping[str, Sequence[float]]
) -> SequenceLoss:
    """The loss of sequences that were scored without a gradient; pure, the same on every rank."""
    numbers = {name: torch.tensor(list(its), dtype=torch.float64) for name, its in fields.items()}
    value, count = (torch.tensor(list(its), dtype=torch.float64) for its in (values, tokens))
    return loss(Sequences(value, count, numbers))
