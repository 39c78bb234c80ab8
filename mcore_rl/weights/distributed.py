"""Transport `distributed`: owners broadcast their buckets to the ranks of all servers (NCCL; gloo on CPU)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import torch
from torch import Tensor

from mcore_rl.errors import RolloutError, WeightSyncError
from mcore_rl.rollout.client import RolloutClient
from mcore_rl.weights.calls import update_body
from mcore_rl.weights.plan import Bucket
from mcore_rl.weights.server_group import ServerGroup, ask_each, forget

_SHARE = 0.5
"""of a call's timeout, after which the group is broken: servers that wait for a missing one answer in time"""
_FAREWELL_SECONDS = 10.0


class Membership:
    """This owner's group with the servers that serve: kept over publishes, remade when they change."""

    def __init__(self) -> None:
        self._group: ServerGroup | None = None
        self._names: dict[str, list[str]] = {}
        """url -> groups that the server was told of, and may still know"""

    async def of(
        self, clients: Mapping[RolloutClient, int], backend: str, failed: dict[str, str]
    ) -> ServerGroup:
        """The group of those `clients` (-> tensor-parallel size) that are not, or become, `failed`.

        Raises:
            WeightSyncError: servers that answer cannot be joined. RolloutError: none is left.
        """
        for attempt in range(len(clients) + 1):
            members = {client.url: size for client, size in clients.items() if client.url not in failed}
            if self._group is not None and self._group.members == members:
                return self._group
            self.abandon()
            alive = [client for client in clients if client.url in members]
            failed |= await forget(alive, self._names)
            alive = [client for client in alive if client.url not in failed]
            if not alive:
                break
            members = {client.url: clients[client] for client in alive}
            self._names = {url: names for url, names in self._names.items() if url not in members}
            group = ServerGroup(members, backend, _SHARE * alive[0].timeout)
            for url in members:
                self._names[url] = [group.name]
            refused, silent = await group.form(alive)
            if not refused and not silent:
                self._group = group
                return group
            group.abandon()
            failed |= silent
            if not silent and attempt:
                raise WeightSyncError(
                    f"no process group with the servers: {refused}. They must reach this machine, and it "
                    "them, on any port (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the interface); or "
                    'set publish.transport = "disk"'
                )
        raise RolloutError(f"no rollout server is left: {failed}")

    def abandon(self) -> None:
        """Break the group."""
        if self._group is not None:
            self._group.abandon()
            self._group = None

    def close(self, clients: list[RolloutClient]) -> None:
        """Leave the servers as they were, as far as they answer."""
        self.abandon()
        if not self._names:
            return
        for client in clients:
            client.timeout = min(client.timeout, _FAREWELL_SECONDS)
        asyncio.run(forget(clients, self._names))


class DistributedChannel:
    """One owner's buffers, and the broadcasts out of them."""

    def __init__(
        self,
        membership: Membership,
        clients: Mapping[RolloutClient, int],
        version: str,
        nbytes: int,
        count: int,
        device: torch.device,
    ) -> None:
        self.failed: dict[str, str] = {}
        self._membership = membership
        self._clients = dict(clients)
        self._version = version
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(min(2, count))]

    def buffer(self, number: int) -> Tensor:
        """As Channel.buffer."""
        return self._buffers[number % 2]

    def send(self, bucket: Bucket, number: int, *, last: bool) -> None:
        """As Channel.send.

        A server that fails breaks the group for all: it is remade without those that do not answer, and the
        bucket sent again to those that may have missed it. To load a bucket twice does no harm.
        """
        data = self.buffer(number)[: bucket.nbytes]
        try:
            asyncio.run(self._send(bucket, data, last=last))
        except RolloutError as error:
            raise WeightSyncError(f"version {self._version} reached no server: {error}") from error

    async def _send(self, bucket: Bucket, data: Tensor, *, last: bool) -> None:
        refusals = 0
        while refusals < 2:
            group = await self._membership.of(self._clients, self._backend, self.failed)
            refused, silent = await self._broadcast(group, bucket, data, last=last)
            self.failed |= silent
            if refused or silent:
                self._membership.abandon()
            if not refused and len(silent) < len(group.members):
                return
            refusals += bool(refused and not silent)
        raise WeightSyncError(
            f"version {self._version} was refused, twice: {refused}. The servers stay paused. See their logs"
        )

    async def _broadcast(
        self, group: ServerGroup, bucket: Bucket, data: Tensor, *, last: bool
    ) -> tuple[dict[str, str], dict[str, str]]:
        """One attempt: (url -> why it refused, url -> why it gave no answer)."""
        body = {
            "names": [slot.name for slot in bucket.slots],
            "dtypes": [str(slot.dtype).removeprefix("torch.") for slot in bucket.slots],
            "shapes": [list(slot.shape) for slot in bucket.slots],
            "group_name": group.name,
            **update_body(bucket, self._version, last=last),
        }

        async def load(client: RolloutClient) -> None:
            try:
                # Once: a second call would wait for a second broadcast.
                await client.control("/update_weights_from_distributed", body, retries=0)
            except RolloutError:
                group.abandon()  # the others, and our own broadcast, need not wait for it
                raise

        alive = [client for client in self._clients if client.url in group.members]
        late = asyncio.get_running_loop().call_later(_SHARE * alive[0].timeout, group.abandon)
        sent = asyncio.create_task(asyncio.to_thread(group.broadcast, data))
        outcome = asyncio.create_task(ask_each(alive, load))
        broken = ""
        try:
            await sent
        except RuntimeError as error:
            group.abandon()  # servers that wait for the rest of it answer now
            broken = str(error)
        refused, silent = await outcome
        late.cancel()
        if broken and not silent:
            refused = dict.fromkeys(group.members, broken) | refused
        return refused, silent

    def close(self) -> None:
        """As Channel.close; the group stays."""
        self._buffers = []
