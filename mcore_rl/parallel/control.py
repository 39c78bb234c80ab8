"""Control between ranks: work that only a replica's lead does, errors that all ranks share, metric sums.

Everything here runs on gloo groups, on the host: small objects, float64 numbers, and numpy arrays, whose
memory travels as it is beside the pickled rest.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mcore_rl.errors import McoreRLError
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.user_code import said

T = TypeVar("T")
K = TypeVar("K")

_SMALL_BYTES = 4096
"""an array of fewer bytes is pickled with the rest: a collective of its own would cost more"""


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
    return _broadcast(result[0], mesh.replica)  # type: ignore[return-value]


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
    return _broadcast(result[0], mesh.world)  # type: ignore[return-value]


def gather_ranks(mesh: Mesh, value: T) -> list[T]:
    """The `value` of every rank in order, on every rank; collective."""
    values = [value] * mesh.world.size()
    dist.all_gather_object(values, value, group=mesh.world)
    return values


def raise_everywhere(mesh: Mesh, error: Exception | None) -> None:
    """Collective: if any rank passes an error, all raise the first by rank, its type kept, `shared` set."""
    errors: list[Exception | None] = [None] * mesh.world.size()
    dist.all_gather_object(errors, _portable(error), group=mesh.world)
    for rank, other in enumerate(errors):
        if other is not None:
            raised = error if rank == mesh.rank and error is not None else other
            raise raised.on_every_rank() if isinstance(raised, McoreRLError) else raised


def _portable(error: Exception | None) -> Exception | None:
    """An exception that survives pickling: ours as they are, others by name."""
    if error is None or isinstance(error, McoreRLError):
        return error
    return RuntimeError(f"{type(error).__name__}: {said(error)}")


def gather_replicas(mesh: Mesh, value: T) -> list[T]:
    """Every replica's value, in data-parallel order, on every rank."""
    if mesh.layout.data == 1:
        return [value]
    mine = to_buffers(value)
    parts: list[tuple[bytes, list[int]]] = [(b"", [])] * mesh.layout.data
    dist.all_gather_object(parts, (mine[0], _sizes(mine[1])), group=mesh.data)
    values = []
    for replica, (rest, sizes) in enumerate(parts):
        own = replica == mesh.dp_rank
        memory = _broadcast_memory(mine[1] if own else None, sizes, mesh.data, replica)
        values.append(value if own else from_buffers(rest, memory))
    return values


def _broadcast(value: T, group: dist.ProcessGroup) -> T:
    """The value of the group's first rank, on all of its ranks; there, the object itself."""
    if group.size() == 1:
        return value
    first = group.rank() == 0
    rest, memory = to_buffers(value) if first else (b"", None)
    head = [(rest, _sizes(memory or []))]
    dist.broadcast_object_list(head, group_src=0, group=group)
    memory = _broadcast_memory(memory, head[0][1], group, 0)
    return value if first else from_buffers(head[0][0], memory)


def _broadcast_memory(
    mine: list[torch.Tensor] | None, sizes: list[int], group: dist.ProcessGroup, source: int
) -> list[torch.Tensor]:
    """The byte tensors of rank `source` of the group, which passes them as `mine`."""
    memory = [torch.empty(size, dtype=torch.uint8) for size in sizes] if mine is None else mine
    for one in memory:
        dist.broadcast(one, group_src=source, group=group)
    return memory


def _sizes(memory: list[torch.Tensor]) -> list[int]:
    return [one.numel() for one in memory]


def to_buffers(value: object) -> tuple[bytes, list[torch.Tensor]]:
    """`value` pickled, and the memory [bytes] of its arrays, not copied."""
    memory: list[torch.Tensor] = []

    def within(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.readonly or raw.nbytes < _SMALL_BYTES:
            return True
        memory.append(torch.frombuffer(raw, dtype=torch.uint8))
        return False

    return pickle.dumps(value, protocol=5, buffer_callback=within), memory


def from_buffers(rest: bytes, memory: list[torch.Tensor]) -> Any:
    """The value of `to_buffers`; its arrays are this memory."""
    # From ranks of this run alone, as everything that torch.distributed carries.
    return pickle.loads(rest, buffers=[one.numpy() for one in memory])  # noqa: S301


def reduce_sums(mesh: Mesh, sums: Mapping[K, torch.Tensor]) -> dict[K, torch.Tensor]:
    """Sum equally named float64 tensors over the ranks that own metrics; every rank gets the result.

    Ranks that own none (earlier stages, other tensor-parallel ranks) may pass anything, even nothing: names
    and shapes are taken from the first owner.
    """
    return _reduce(mesh, sums, dist.ReduceOp.SUM, 0.0)


def reduce_maxima(mesh: Mesh, maxima: Mapping[K, torch.Tensor]) -> dict[K, torch.Tensor]:
    """Reduce to the largest; -inf where no rank has a row, inf for a NaN, which MAX may drop."""
    seen = {name: torch.where(value.isnan(), torch.inf, value) for name, value in maxima.items()}
    return _reduce(mesh, seen, dist.ReduceOp.MAX, -torch.inf)


def _reduce(mesh: Mesh, values: Mapping[K, torch.Tensor], op, neutral: float) -> dict[K, torch.Tensor]:
    mine = {name: tuple(value.shape) for name, value in values.items()} if mesh.owns_metrics else None
    shapes: list[dict[K, tuple[int, ...]] | None] = [None] * mesh.world.size()
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
