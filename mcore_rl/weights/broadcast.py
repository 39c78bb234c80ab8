"""Transport `distributed`: owners broadcast buckets to the ranks of every server (NCCL; gloo on CPU).

A process group has one rank here, the source, and the ranks of one rollout server in their own processes. It
is made as SGLang makes its side (torch's helper for groups outside of the world), over a store of its own.
"""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed import distributed_c10d as c10d

from mcore_rl.errors import RolloutError, WeightSyncError
from mcore_rl.model import platform
from mcore_rl.model.build import Model
from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.rollout.fleet import Fleet, on_each
from mcore_rl.weights.buckets import Bucket
from mcore_rl.weights.encoding import PLAIN, Encoding
from mcore_rl.weights.online import publish_online, update_body

_FAREWELL_SECONDS = 10.0
_POLL_SECONDS = 0.001


class Distributed:
    """The transport to servers on any machine: owners broadcast to the servers' ranks.

    Args:
        bucket_bytes: of a bucket; two are held at a time.
        encoding: what the servers get, which they must have been started with.
    """

    def __init__(self, bucket_bytes: int, encoding: Encoding = PLAIN) -> None:
        self._bucket_bytes, self._encoding = bucket_bytes, encoding
        self._groups = Groups()

    def publish(self, model: Model, fleet: Fleet, version: str) -> dict[str, str]:
        """Do what Transport.publish says."""
        channel = partial(DistributedChannel, self._groups, device=platform.device())
        return publish_online(model, fleet, version, self._bucket_bytes, channel, self._encoding)

    def close(self, fleet: Fleet) -> None:
        """Leave the groups with the servers."""
        self._groups.close(fleet.serving)


class Groups:
    """This owner's groups, one with every server: kept over publishes, remade when one breaks.

    In one group of all servers a dead member would end the others: NCCL's watchdog ends their processes, and
    in gloo's tree whoever waits behind a stopped one waits for torch's half an hour.
    """

    def __init__(self) -> None:
        self._groups: dict[str, ServerGroup] = {}
        self._names: dict[str, str] = {}
        """url -> the group that the server was told of last"""

    async def of(self, client: RolloutClient, ranks: int, backend: str) -> tuple[ServerGroup, bool]:
        """The group with one (opened) server, and whether it is new. Raises RolloutError."""
        group = self._groups.get(client.url)
        if group is not None and group.ranks == ranks:
            return group, False
        self.abandon(client.url)
        if client.url in self._names:
            await forget(client, self._names.pop(client.url))
        group = ServerGroup(ranks, backend, client.timeout)
        self._names[client.url] = group.name
        await group.form(client)
        self._groups[client.url] = group
        return group, True

    def abandon(self, url: str) -> None:
        """Break the group with a server, if there is one."""
        group = self._groups.pop(url, None)
        if group is not None:
            group.abandon()

    def close(self, clients: Sequence[RolloutClient]) -> None:
        """Leave the servers as they were, as far as they answer."""
        told = [client for client in clients if client.url in self._names]
        for client in told:
            client.timeout = min(client.timeout, _FAREWELL_SECONDS)
        asyncio.run(on_each(told, lambda client: forget(client, self._names[client.url])))
        for url in list(self._groups):
            self.abandon(url)


class DistributedChannel:
    """One owner's buffers, and the broadcasts out of them."""

    def __init__(
        self,
        groups: Groups,
        clients: Mapping[RolloutClient, int],
        version: str,
        nbytes: int,
        count: int,
        device: torch.device,
    ) -> None:
        self.failed: dict[str, str] = {}
        self._groups = groups
        self._clients = dict(clients)
        self._version = version
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(min(2, count))]

    def buffer(self, number: int) -> Tensor:
        """Memory for bucket `number`."""
        return self._buffers[number % 2]

    def send(self, bucket: Bucket, number: int, *, last: bool) -> None:
        """Returns when every server that takes part has loaded the bucket."""
        data = self.buffer(number)[: bucket.nbytes]
        body = {
            "names": [slot.name for slot in bucket.slots],
            "dtypes": [str(slot.dtype).removeprefix("torch.") for slot in bucket.slots],
            "shapes": [list(slot.shape) for slot in bucket.slots],
            **update_body(bucket, self._version, last=last),
        }
        alive = [client for client in self._clients if client.url not in self.failed]
        self.failed |= asyncio.run(on_each(alive, lambda client: self._load(client, body, data)))[1]

    async def _load(self, client: RolloutClient, body: Mapping[str, Any], data: Tensor) -> None:
        """One server; again in a new group, where it may have been started anew since the last publish."""
        group, new = await self._groups.of(client, self._clients[client], self._backend)
        try:
            await _broadcast(group, client, body, data)
        except RejectedError as error:
            self._groups.abandon(client.url)
            if new:
                raise WeightSyncError(
                    f"{client.url} did not load version {self._version}: {error}. It stays paused. "
                    "See its log"
                ) from error
            await self._load(client, body, data)
        except RolloutError:
            self._groups.abandon(client.url)
            raise

    def close(self) -> None:
        """Give the buffers back; the groups stay."""
        self._buffers = []


async def _broadcast(
    group: ServerGroup, client: RolloutClient, body: Mapping[str, Any], data: Tensor
) -> None:
    """Both sides of one broadcast. Raises RolloutError."""
    sent = asyncio.create_task(asyncio.to_thread(group.broadcast, data))
    sent.add_done_callback(lambda task: group.abandon() if task.exception() else None)  # it need not wait
    try:
        # Once: a second call would wait for a second broadcast.
        await client.control(
            "/update_weights_from_distributed", {**body, "group_name": group.name}, retries=0
        )
    except RolloutError:
        group.abandon()
        await asyncio.gather(sent, return_exceptions=True)
        raise
    try:
        await sent
    except RuntimeError as error:
        raise RolloutError(f"{client.url}: a broadcast did not reach all of its ranks: {error}") from error


# --- one group ---


class ServerGroup:
    """Rank 0 of the group, once it is formed.

    Args:
        ranks: of the server: its tensor-parallel size.
        backend: `gloo` or `nccl`.
        timeout: seconds for any wait.
    """

    def __init__(self, ranks: int, backend: str, timeout: float) -> None:
        self.ranks = ranks
        self.name = f"mcore_rl_{uuid.uuid4().hex[:12]}"
        self._backend = backend
        self._timeout = timedelta(seconds=timeout)
        self._group: Any = None

    async def form(self, client: RolloutClient) -> None:
        """The (opened) server joins, and so do we. Raises RolloutError when one of the two does not."""
        address = _own_address(client.url)
        store: Any = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        body = {"master_address": address, "master_port": store.port, "rank_offset": 1}
        body |= {"world_size": 1 + self.ranks, "group_name": self.name, "backend": self._backend}
        own = asyncio.create_task(asyncio.to_thread(self._join, store))
        del store  # it ends with our attempt, and with it that of the server
        try:
            await client.control("/init_weights_update_group", body, retries=0)
        finally:
            (error,) = await asyncio.gather(own, return_exceptions=True)
        if error is not None:
            raise RolloutError(
                f"{client.url}: no process group with it over {address}: {error}. It must reach this machine "
                "and be reached, on any port (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: the interface)"
            )

    def _join(self, store: Any) -> None:
        size = 1 + self.ranks
        group, _ = c10d._new_process_group_helper(
            size,
            0,
            [],
            c10d.Backend(self._backend),
            c10d.PrefixStore(self.name, store),
            group_name=self.name,  # pyright: ignore[reportArgumentType]
            timeout=self._timeout,
        )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        self._group = group

    def broadcast(self, data: Tensor) -> None:
        """Returns when `data` [bytes] has been sent. Raises RuntimeError: a broken group, or the deadline."""
        group = self._group
        if group is None:
            raise RuntimeError("the group was abandoned")
        if not data.is_cuda:
            dist.broadcast(data, group_src=0, group=group)
            return
        torch.cuda.set_device(data.device)  # of this thread
        work: Any = dist.broadcast(data, group_src=0, group=group, async_op=True)
        end = time.monotonic() + self._timeout.total_seconds()
        while not work.is_completed():
            if time.monotonic() > end or self._group is None:
                raise RuntimeError("a broadcast was not finished at the deadline")
            time.sleep(_POLL_SECONDS)

    def abandon(self) -> None:
        """Break the connections, so that nobody waits for what will not come. May be called again."""
        group, self._group = self._group, None
        if group is not None:
            with suppress(Exception):  # it is broken already
                group.abort()
            with suppress(Exception):
                dist.destroy_process_group(group)


async def forget(client: RolloutClient, name: str) -> None:
    """The (opened) server leaves the group. Raises RolloutError when it does not answer."""
    with suppress(RejectedError):  # it never joined, or was started anew
        await client.control("/destroy_weights_update_group", {"group_name": name})


def _own_address(url: str) -> str:
    """Where a server reaches this machine: the address that it would send to it from."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        except OSError as error:
            raise RolloutError(f"{url}: no way there from this machine ({error})") from error
        return str(probe.getsockname()[0])
