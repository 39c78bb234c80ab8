"""What a step asks of its models: a forward pass alone, for log-probs and values, or an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.algo.metrics import Key
from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import NumericsError
from mcore_rl.model.build import Model
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.model.residency import Residency
from mcore_rl.model.step import Loss, forward, forward_backward
from mcore_rl.parallel.head.divergence import Against
from mcore_rl.training.batch import Batching, pack_share
from mcore_rl.training.metrics import losses_are_finite
from mcore_rl.types import PackedBatch


@dataclass(frozen=True)
class Update:
    """What one optimizer step is made of."""

    kind: str
    """`policy`, `critic`, `supervised`, `preference`, `reward_model` or `distill`: model and objective"""
    step: int
    optimizer: Optimizer
    objective: Loss
    batches: Sequence[PackedBatch]
    """this replica's micro-batches; equally many everywhere"""
    temperature: float
    ids: Sequence[str]
    """those of the samples that the rows' field `sample` numbers"""
    against: Sequence[Against | None] = ()
    """of each micro-batch, what a student is compared with; none at all for the others"""

    followed: bool = False
    """another update of the same model comes next: its forward pass may begin before all weights are there"""

    @property
    def phase(self) -> str:
        """Whose update it is, in phases.PHASES."""
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
        sums = forward_backward(
            optimizer.model, update.batches, update.objective, update.temperature, against=update.against
        )
        finite = losses_are_finite(sums)
        try:
            with residency.during(f"{update.phase} step"):
                norm = optimizer.step(finite=finite)
            if not update.followed:
                optimizer.model.gather()
            return sums, norm
        except NumericsError as error:
            raised = NumericsError(f"step {update.step}, {update.kind}: {error}. {explain(update)}")
            raise raised.on_every_rank() from error


def log_probs(
    model: Model, sequences: Sequence[TokenSequence], shape: Batching, temperature: float
) -> list[np.ndarray]:
    """float32 log-probs [n_i] of every sequence's scored tokens, the same on every rank; collective."""
    return _score(model, sequences, shape, temperature, lambda head: head.log_prob)


def values(critic: Model, sequences: Sequence[TokenSequence], shape: Batching) -> list[np.ndarray]:
    """float32 values [n_i] of the state before each scored token, the same on every rank; collective."""
    return _score(critic, sequences, shape, 1.0, lambda values: values)


def _score(
    model: Model,
    sequences: Sequence[TokenSequence],
    shape: Batching,
    temperature: float,
    pick: Callable[..., Tensor],
) -> list[np.ndarray]:
    """The replicas share the work; rows are told apart by number, so it does not matter who scored them."""
    bounds = np.cumsum([0, *(sequence.scored for sequence in sequences)])
    numbers = [np.arange(start, stop) for start, stop in pairwise(bounds)]
    batches = pack_share(sequences, {"number": numbers}, shape, model.mesh)
    scored = torch.zeros(int(bounds[-1]))
    answers = forward(model, batches, temperature)
    if model.mesh.owns_metrics:
        number = torch.cat([batch.fields["number"] for batch, _ in answers])
        scored[number.cpu()] = torch.cat([pick(output).float() for _, output in answers]).cpu()
    dist.all_reduce(scored, group=model.mesh.world)  # every row was written by one rank, the others add 0
    return np.split(scored.numpy(), bounds[1:-1])
