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
from typing import Any

from mcore_rl.errors import ConfigError, RolloutError
from mcore_rl.model.build import Model
from mcore_rl.parallel.control import gather_ranks, on_main, raise_everywhere
from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.rollout.fleet import Fleet, on_each
from mcore_rl.terminal import escaped
from mcore_rl.weights.buckets import (
    Bucket,
    Channel,
    Export,
    ExportPlan,
    export_of,
    plan_of,
    take_turn,
    turns_of,
)
from mcore_rl.weights.encoding import Encoding
from mcore_rl.weights.transport import nobody

OpenChannel = Callable[[Mapping[RolloutClient, int], str, int, int], Channel]
"""(clients -> tensor-parallel sizes, version, bytes of a buffer, how many buckets) -> the owner's channel"""


def publish_online(
    model: Model,
    fleet: Fleet,
    version: str,
    bucket_bytes: int,
    open_channel: OpenChannel,
    encoding: Encoding,
) -> dict[str, str]:
    """Every server takes the weights of `model` as `version`; collective over all ranks.

    Each copy of the model that the ranks hold sends to servers of its own, all at the same time. Servers that
    were lost and answer again are published to like the others. Returns those that failed (url -> why), which
    the caller counts as lost.

    Raises:
        WeightSyncError: on every rank, when no server has loaded them.
        NumericsError: on every rank, when a weight cannot be encoded; the servers stay paused.
        ConfigError: on every rank, when a server cannot be updated so.
    """
    mesh, export = model.mesh, export_of(model, encoding)
    plan = plan_of(export, bucket_bytes)
    sizes, failed = on_main(mesh, lambda: _open(fleet))
    mine = servers_of(mesh.copy, mesh.layout.copies, fleet.status.urls)
    for turn in range(max(gather_ranks(mesh, len(plan.owners)))):
        alive = {fleet.client(url): size for url, size in sizes.items() if url not in failed}
        if not alive:
            raise nobody(fleet, version, failed)
        own = {client: size for client, size in alive.items() if client.url in mine}
        failed |= _turn(export, plan, turn, own, partial(open_channel, own, version))
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
    export: Export,
    plan: ExportPlan,
    turn: int,
    clients: Mapping[RolloutClient, int],
    open_channel: Callable[[int, int], Channel],
) -> dict[str, str]:
    """One owner's buckets of every copy; collective over all ranks, which return the servers that failed.

    Args:
        clients: of this rank's copy; without any it only waits for the others.
    """
    mesh = export.mesh
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
        if owner is not None and owner in turns_of(plan, mesh):
            take_turn(export, plan, owner, channel)
    except Exception as caught:
        error = caught
    finally:
        if channel is not None:
            channel.close()
    raise_everywhere(mesh, error)
    return dict(ChainMap(*gather_ranks(mesh, channel.failed if channel is not None else {})))


# --- SGLang's calls around an update, each of one (opened) client ---


async def open_update(client: RolloutClient) -> int:
    """Pause the server and let it take weights; returns its tensor-parallel size.

    What was running is retracted, as for an update from disk, and goes on without the old weights' cache. A
    publish may meet what an earlier one left, when a trainer or a server broke off.

    Raises:
        ConfigError: it cannot be updated so. RolloutError: no usable answer.
    """
    size = _tensor_parallel_size(client.url, await client.server_info())
    await client.pause("retract")
    try:
        await client.control("/begin_weight_update", {})
    except RejectedError:
        # Open already: by a publish that broke off, or by an attempt whose answer was lost.
        await client.control("/end_weight_update", {})
        await client.control("/begin_weight_update", {})
    return size


def _tensor_parallel_size(url: str, info: Mapping[str, Any]) -> int:
    if "embedded" in str(info.get("version", "")):
        raise ConfigError(
            f"{url}: the embedded server loads weights from disk only; use an SGLang server, or set "
            'publish.transport = "disk"'
        )
    if info.get("pp_size", 1) != 1:
        raise ConfigError(
            f"{url}: pp_size = {escaped(info['pp_size'])}, and SGLang gives weights to the first stage only; "
            'start it with --tp-size instead, or set publish.transport = "disk"'
        )
    size = info.get("tp_size", 1)
    if type(size) is not int or size < 1:
        raise RolloutError(f"{url}/server_info: tp_size = {escaped(repr(size))} is no number of ranks")
    return size


async def end_update(client: RolloutClient) -> None:
    """Close the update and end the pause. Raises RolloutError."""
    try:
        await client.control("/end_weight_update", {})
    except RejectedError as error:
        if "no weight-update session" not in str(error):  # else an earlier attempt's answer was lost
            raise
    await client.resume()


def update_body(bucket: Bucket, version: str, *, last: bool) -> dict[str, Any]:
    """What both kinds of update say besides the weights: the version changes, and the cache goes, at the end.

    A cache that is flushed between buckets would be of weights that nobody has published.
    """
    stamp = {"weight_version": version} if last else {}
    return {"load_format": "flattened_bucket", "flush_cache": last, **stamp}
