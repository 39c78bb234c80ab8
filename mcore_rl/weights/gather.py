"""Fills buckets: HF tensors in their place in memory, out of the shards of the tensor-parallel ranks.

Every owner takes its turn: its ranks fill bucket k + 1 while a thread sends bucket k. The thread uses
process groups and connections of its own, never those of the filling.
"""

from __future__ import annotations

from collections.abc import Mapping as Named
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from mcore_rl.errors import WeightSyncError
from mcore_rl.model.build import Model
from mcore_rl.model.mapping import Mapping, global_parameters
from mcore_rl.model.weights_io import is_owner_in_copy, is_published
from mcore_rl.parallel.control import of_all, raise_everywhere
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.weights.plan import Bucket, Held, Plan, Slot, is_cut, plan_buckets


class Channel(Protocol):
    """How one owner's buckets reach the servers, in one publish; opened with the memory that it needs."""

    failed: dict[str, str]
    """url -> why, of servers that take part no more"""

    def buffer(self, number: int) -> Tensor:
        """[bytes] uint8 on the model's device, to fill with bucket `number`; number - 2 has arrived."""
        ...

    def send(self, bucket: Bucket, number: int, *, last: bool) -> None:
        """Returns when every server that takes part has loaded it; in a thread. `last` of the publish.

        Raises:
            WeightSyncError: a server refuses it.
        """
        ...

    def close(self) -> None:
        """The turn is over: what was opened for it is given back."""
        ...


def plan_of(model: Model, bucket_bytes: int) -> Plan:
    """How this rank's copy of the model is sent, the same on all of its ranks; collective over all copies."""
    mesh, mapping = model.mesh, model.mapping
    own = [
        Held(name, parameter.dtype, parameter.numel() * parameter.dtype.itemsize)
        for name, parameter in global_parameters(model.unwrapped).items()
        if is_published(mapping, name) and is_owner_in_copy(mesh, mapping.entry(name))
    ]
    held = [mine if copy == mesh.copy else [] for copy, mine in of_all(mesh, (mesh.copy, own))]
    plan: Plan | None = None
    error: WeightSyncError | None = None
    try:
        plan = plan_buckets(held, mapping, mesh.layout.tensor, bucket_bytes)
    except WeightSyncError as caught:  # raised on the ranks of every copy
        error = caught
    raise_everywhere(mesh, error)
    assert plan is not None
    return plan


def take_turn(model: Model, plan: Plan, owner: int, channel: Channel | None) -> None:
    """The buckets of `owner`, which alone has a channel; every rank of its tensor-parallel group calls it.

    An error of the channel is raised when all buckets have been filled, so that no rank is left waiting.
    """
    parameters = global_parameters(model.unwrapped)
    if channel is None:
        for bucket in plan.of(owner):
            _give(bucket, parameters, model.mapping, model.mesh)
        return
    scratch = torch.empty(plan.scratch, dtype=torch.uint8, device=_device(parameters))
    sent: Future[None] | None = None
    error: Exception | None = None
    with ThreadPoolExecutor(1) as thread:
        for number, bucket in enumerate(plan.of(owner)):
            _fill(bucket, channel.buffer(number), scratch, parameters, model.mapping, model.mesh)
            error = error or _outcome(sent)
            last = bucket is plan.buckets[-1]
            sent = None if error else thread.submit(channel.send, bucket, number, last=last)
        error = error or _outcome(sent)
    if error is not None:
        raise error


def _outcome(sent: Future[None] | None) -> Exception | None:
    """What the thread's call raised, once it has returned."""
    error = sent.exception() if sent is not None else None
    if error is not None and not isinstance(error, Exception):
        raise error
    return error


def _fill(
    bucket: Bucket,
    data: Tensor,
    scratch: Tensor,
    parameters: Named[str, Tensor],
    mapping: Mapping,
    mesh: Mesh,
) -> None:
    """The owner's part: its own shards to their places, then those that the others send, one at a time."""
    ranks = mesh.layout.tensor
    for part in bucket.parts:
        entry = mapping.entry(part.megatron)
        out = [_view(data, slot) for slot in part.slots]
        shard = _shard(parameters, part.megatron)
        if not is_cut(mapping, part.megatron, ranks):
            mapping.place(entry, shard, 0, 1, out)
            continue
        mapping.place(entry, shard, mesh.tp_rank, ranks, out)
        for rank in range(ranks):
            if rank != mesh.tp_rank:
                other = scratch[: shard.nbytes].view(shard.dtype).view(shard.shape)
                dist.recv(other, group_src=rank, group=mesh.tp)
                mapping.place(entry, other, rank, ranks, out)
    if data.is_cuda:
        torch.cuda.current_stream().synchronize()  # who reads it next is another thread, or process


def _give(bucket: Bucket, parameters: Named[str, Tensor], mapping: Mapping, mesh: Mesh) -> None:
    """Another rank's part: its shards to the owner."""
    owner = dist.get_group_rank(mesh.tp, bucket.owner)
    for part in bucket.parts:
        if is_cut(mapping, part.megatron, mesh.layout.tensor):
            dist.send(_shard(parameters, part.megatron), group_dst=owner, group=mesh.tp)


def _shard(parameters: Named[str, Tensor], megatron: str) -> Tensor:
    tensor = parameters[megatron].detach()
    return (dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor).contiguous()


def _view(data: Tensor, slot: Slot) -> Tensor:
    return data[slot.begin : slot.end].view(slot.dtype).view(slot.shape)


def _device(parameters: Named[str, Tensor]) -> torch.device:
    return next(iter(parameters.values())).device
