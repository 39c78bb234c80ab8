"""Control between ranks: work that only a replica's lead does, errors that all ranks share, metric sums.

Everything here runs on gloo groups, on the host: small objects and float64 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from mcore_rl.errors import McoreRLError
from mcore_rl.parallel.mesh import Mesh

T = TypeVar("T")


def on_leads(mesh: Mesh, work: Callable[[], T]) -> T:
    """Run `work` on the lead rank of every replica; all ranks of a replica return its result.

    An exception on one lead is raised on EVERY rank of the world, so nobody waits for a rank that has left.
    """
    result: list[T | None] = [None]
    error: Exception | None = None
    if mesh.is_replica_lead:
        try:
            result = [work()]
        except Exception as caught:  # handed to all ranks below
            error = caught
    raise_everywhere(mesh, error)
    dist.broadcast_object_list(result, group_src=0, group=mesh.replica)
    return result[0]  # type: ignore[return-value]


def on_main(mesh: Mesh, work: Callable[[], T]) -> T:
    """Run `work` on the main rank; every rank returns its result, or raises its exception."""
    result: list[T | None] = [None]
    error: Exception | None = None
    if mesh.is_main:
        try:
            result = [work()]
        except Exception as caught:  # handed to all ranks below
            error = caught
    raise_everywhere(mesh, error)
    dist.broadcast_object_list(result, group_src=0, group=mesh.world)
    return result[0]  # type: ignore[return-value]


def from_rank(mesh: Mesh, value: T, rank: int) -> T:
    """The `value` of global `rank`, on every rank; collective."""
    values = [value]
    dist.broadcast_object_list(values, group_src=rank, group=mesh.world)
    return values[0]


def raise_everywhere(mesh: Mesh, error: Exception | None) -> None:
    """Collective: if any rank passes an error, all raise the first by rank, its type kept, `shared` set."""
    errors: list[Exception | None] = [None] * mesh.layout.world_size
    dist.all_gather_object(errors, _portable(error), group=mesh.world)
    for rank, other in enumerate(errors):
        if other is not None:
            raised = error if rank == mesh.rank and error is not None else other
            if isinstance(raised, McoreRLError):
                raised.shared = True
            raise raised


def _portable(error: Exception | None) -> Exception | None:
    """An exception that survives pickling: ours as they are, others by name."""
    if error is None or isinstance(error, McoreRLError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def gather_replicas(mesh: Mesh, value: T) -> list[T]:
    """Every replica's value, in data-parallel order, on every rank."""
    values: list[T] = [value] * mesh.layout.data
    if mesh.layout.data > 1:
        dist.all_gather_object(values, value, group=mesh.data)
    return values


def reduce_sums(mesh: Mesh, sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum equally named float64 tensors over the ranks that own metrics; every rank gets the result.

    Ranks that own none (earlier stages, other tensor-parallel ranks) may pass anything, even nothing: names
    and shapes are taken from the first owner.
    """
    return _reduce(mesh, sums, dist.ReduceOp.SUM, 0.0)


def reduce_maxima(mesh: Mesh, maxima: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As reduce_sums, taking the largest; -inf where no rank has a row, inf for a NaN, which MAX may drop."""
    seen = {name: torch.where(value.isnan(), torch.inf, value) for name, value in maxima.items()}
    return _reduce(mesh, seen, dist.ReduceOp.MAX, -torch.inf)


def _reduce(mesh: Mesh, values: Mapping[str, torch.Tensor], op, neutral: float) -> dict[str, torch.Tensor]:
    mine = {name: tuple(value.shape) for name, value in values.items()} if mesh.owns_metrics else None
    shapes: list[dict[str, tuple[int, ...]] | None] = [None] * mesh.layout.world_size
    dist.all_gather_object(shapes, mine, group=mesh.world)
    known = next(shape for shape in shapes if shape is not None)
    flat = torch.full(
        (sum(torch.Size(shape).numel() for shape in known.values()),), neutral, dtype=torch.float64
    )
    if mesh.owns_metrics and values:
        flat = torch.cat([values[name].detach().double().cpu().reshape(-1) for name in known])
    dist.all_reduce(flat, op=op, group=mesh.world)
    parts = flat.split([torch.Size(shape).numel() for shape in known.values()])
    return {name: part.view(shape) for (name, shape), part in zip(known.items(), parts, strict=True)}
