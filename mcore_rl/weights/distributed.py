"""Transport `distributed`: owners broadcast buckets to the ranks of every server (NCCL; gloo on CPU)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mcore_rl.errors import RolloutError, WeightSyncError
from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.rollout.fleet import on_each
from mcore_rl.weights.calls import update_body
from mcore_rl.weights.plan import Bucket
from mcore_rl.weights.server_group import ServerGroup, forget

_FAREWELL_SECONDS = 10.0


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
        """As Channel.buffer."""
        return self._buffers[number % 2]

    def send(self, bucket: Bucket, number: int, *, last: bool) -> None:
        """As Channel.send."""
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
        """As Channel.close; the groups stay."""
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
