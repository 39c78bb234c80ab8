"""Weights straight into servers that run, bucket by bucket, without a file in between.

All names are known to be there before any server is told. Then every server is paused, its requests
retracted, and an update opened; the owners of each copy send their buckets, one after the other; the update
is closed, and the pause ends. A server that fails on the way stays paused, for it holds neither version, and
is lost alone.
"""

from __future__ import annotations

import asyncio
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch.distributed as dist

from mcore_rl.model.build import Model
from mcore_rl.parallel.control import of_all, on_main, raise_everywhere
from mcore_rl.rollout.client import RolloutClient
from mcore_rl.rollout.fleet import Fleet, on_each
from mcore_rl.weights.calls import end_update, open_update
from mcore_rl.weights.gather import Channel, plan_of, take_turn
from mcore_rl.weights.plan import Plan
from mcore_rl.weights.publish import nobody

OpenChannel = Callable[[Mapping[RolloutClient, int], str, int, int], Channel]
"""(clients -> tensor-parallel sizes, version, bytes of a buffer, how many buckets) -> the owner's channel"""


def publish_online(
    model: Model, fleet: Fleet, version: str, bucket_bytes: int, open_channel: OpenChannel
) -> dict[str, str]:
    """Every server takes the weights of `model` as `version`; collective over all ranks.

    Each copy of the model that the ranks hold sends to servers of its own, all at the same time. Servers that
    were lost and answer again are published to like the others. Returns those that failed (url -> why), which
    the caller counts as lost.

    Raises:
        WeightSyncError: on every rank, when a server refuses the weights, or none is left that has them.
        ConfigError: on every rank, when a server cannot be updated so.
    """
    mesh = model.mesh
    plan = plan_of(model, bucket_bytes)
    sizes, failed = on_main(mesh, lambda: _open(fleet))
    mine = servers_of(mesh.copy, mesh.layout.copies, fleet.status.urls)
    for turn in range(max(of_all(mesh, len(plan.owners)))):
        alive = {fleet.client(url): size for url, size in sizes.items() if url not in failed}
        if not alive:
            raise nobody(fleet, version, failed)
        own = {client: size for client, size in alive.items() if client.url in mine}
        failed |= _turn(model, plan, turn, own, partial(open_channel, own, version))
    alive = [fleet.client(url) for url in sizes if url not in failed]
    loaded, unended = on_main(mesh, lambda: asyncio.run(on_each(alive, end_update)))
    failed |= unended
    if not loaded:
        raise nobody(fleet, version, failed)
    fleet.status = on_main(mesh, lambda: fleet.mark_published(loaded))
    fleet.version = version
    return failed


def servers_of(copy: int, copies: int, urls: Sequence[str]) -> frozenset[str]:
    """Those that a copy of the model sends to: always the same, whichever others are lost."""
    return frozenset(urls[copy::copies])


def _open(fleet: Fleet) -> tuple[dict[str, int], dict[str, str]]:
    """(url -> tensor-parallel size of the servers that wait for weights, url -> why another one does not)."""
    clients = [*fleet.serving, *fleet.returning()]
    return asyncio.run(on_each(clients, open_update))


def _turn(
    model: Model,
    plan: Plan,
    turn: int,
    clients: Mapping[RolloutClient, int],
    open_channel: Callable[[int, int], Channel],
) -> dict[str, str]:
    """One owner's buckets of every copy; collective over all ranks, which return the servers that failed.

    Args:
        clients: of this rank's copy; without any it only waits for the others.
    """
    mesh = model.mesh
    channel: Channel | None = None
    error: Exception | None = None
    owner = plan.owners[turn] if clients and turn < len(plan.owners) else None
    if owner is not None and owner == mesh.rank:
        buckets = plan.of(owner)
        try:
            channel = open_channel(max(bucket.nbytes for bucket in buckets), len(buckets))
        except Exception as caught:  # raised on every rank, before another one waits for this
            error = caught
    raise_everywhere(mesh, error)
    try:
        if owner is not None and owner in dist.get_process_group_ranks(mesh.tp):
            take_turn(model, plan, owner, channel)
    except Exception as caught:
        error = caught
    finally:
        if channel is not None:
            channel.close()
    raise_everywhere(mesh, error)
    return dict(ChainMap(*of_all(mesh, channel.failed if channel is not None else {})))
