"""Score samples with a model: what later mini-batches, the KL and GAE need before the first update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.data.packing import TokenSequence
from mcore_rl.model.build import Model
from mcore_rl.model.step import forward
from mcore_rl.training.batch import Shape, pack_share


def log_probs(
    model: Model, sequences: Sequence[TokenSequence], shape: Shape, temperature: float
) -> list[np.ndarray]:
    """float32 log-probs [n_i] of every sequence's scored tokens, the same on every rank; collective."""
    return _score(model, sequences, shape, temperature, lambda head: head.log_prob)


def values(critic: Model, sequences: Sequence[TokenSequence], shape: Shape) -> list[np.ndarray]:
    """float32 values [n_i] of the state before each scored token, the same on every rank; collective."""
    return _score(critic, sequences, shape, 1.0, lambda values: values)


def _score(
    model: Model,
    sequences: Sequence[TokenSequence],
    shape: Shape,
    temperature: float,
    pick: Callable[..., Tensor],
) -> list[np.ndarray]:
    """The replicas share the work; rows are told apart by number, so it does not matter who scored them."""
    bounds = np.cumsum([0, *(sequence.scored for sequence in sequences)])
    numbers = [np.arange(start, stop) for start, stop in pairwise(bounds)]
    batches = pack_share(sequences, {"number": numbers}, shape, model.mesh)
    scored = torch.zeros(int(bounds[-1]))
    for batch, output in forward(model, batches, temperature):
        if model.mesh.owns_metrics:
            scored[batch.fields["number"].cpu()] = pick(output).float().cpu()
    dist.all_reduce(scored, group=model.mesh.world)  # every row was written by one rank, the others add 0
    return np.split(scored.numpy(), bounds[1:-1])
