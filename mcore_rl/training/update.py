"""One optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mcore_rl.algo.metrics import Key
from mcore_rl.errors import NumericsError
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.model.residency import Residency
from mcore_rl.model.step import Loss, forward_backward
from mcore_rl.training.metrics import loss_is_finite
from mcore_rl.types import PackedBatch


@dataclass(frozen=True)
class Update:
    """What one optimizer step is made of."""

    kind: str
    """`policy`, `critic`, `supervised` or `preference`: which model, and which objective"""
    step: int
    optimizer: Optimizer
    objective: Loss
    batches: Sequence[PackedBatch]
    """this replica's micro-batches; equally many everywhere"""
    temperature: float
    ids: Sequence[str]
    """those of the samples that the rows' field `sample` numbers"""

    @property
    def phase(self) -> str:
        """Whose update it is, in residency.PHASES."""
        return "critic" if self.kind == "critic" else "policy"


def run_update(
    update: Update, residency: Residency, explain: Callable[[Update], str]
) -> tuple[list[Mapping[Key, Tensor]], float]:
    """The objective's sums of each micro-batch, and the gradient norm; collective.

    Args:
        explain: asked, on every rank, where numbers are not finite: says which micro-batch did it.

    Raises:
        NumericsError: on every rank, before any weight changes, when a loss or the gradient is not finite.
    """
    optimizer = update.optimizer
    with residency.during(update.phase):
        optimizer.zero_grad()
        sums = forward_backward(optimizer.model, update.batches, update.objective, update.temperature)
        finite = all(loss_is_finite(one) for one in sums)
        try:
            with residency.during(f"{update.phase} step"):
                return sums, optimizer.step(finite=finite)
        except NumericsError as error:
            raised = NumericsError(f"step {update.step}, {update.kind}: {error}. {explain(update)}")
            raise raised.on_every_rank() from error
