"""A process group of one rank here, the source, and the ranks of rollout servers in their own processes.

Made as SGLang makes its side (torch's helper for groups outside of the world), over a store of its own.
"""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.rollout.fleet import on_each

_POLL_SECONDS = 0.001


class ServerGroup:
    """Rank 0 of the group, once `form` has returned nothing.

    Args:
        members: url -> tensor-parallel size; ranks are given in this order.
        backend: `gloo` or `nccl`.
        timeout: seconds for any wait.
    """

    def __init__(self, members: Mapping[str, int], backend: str, timeout: float) -> None:
        self.members = dict(members)
        self.name = f"mcore_rl_{uuid.uuid4().hex[:12]}"
        self._backend = backend
        self._timeout = timedelta(seconds=timeout)
        self._group: Any = None

    async def form(self, clients: Sequence[RolloutClient]) -> tuple[dict[str, str], dict[str, str]]:
        """Every server joins, and so do we: (url -> why it refused, url -> why it gave no answer)."""
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        offsets, size = {}, 1
        for url, ranks in self.members.items():
            offsets[url] = size
            size += ranks
        body = {"master_address": own_address(list(self.members)), "master_port": store.port}
        body |= {"world_size": size, "group_name": self.name, "backend": self._backend}

        async def ask(client: RolloutClient) -> None:
            offset = {"rank_offset": offsets[client.url]}
            await client.control("/init_weights_update_group", {**body, **offset}, retries=0)

        own = asyncio.create_task(asyncio.to_thread(self._join, store, size))
        del store  # it ends with our attempt, and with it those of the servers
        refused, silent = await ask_each(clients, ask)
        try:
            await own
        except Exception as error:
            if not refused and not silent:
                refused = dict.fromkeys(self.members, f"no group of {size} ranks: {error}")
        return refused, silent

    def _join(self, store: Any, size: int) -> None:
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
        """Returns when `data` [bytes] has been sent. Raises RuntimeError: a broken group, or a deadline."""
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
        """Break all connections, so that nobody waits for what will not come. May be called again."""
        group, self._group = self._group, None
        if group is not None:
            with suppress(Exception):  # it is broken already
                group.abort()
            with suppress(Exception):
                dist.destroy_process_group(group)


async def forget(clients: Sequence[RolloutClient], names: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Servers leave the groups `names` (by url). Returns url -> why of those that do not answer."""

    async def ask(client: RolloutClient) -> None:
        for name in names.get(client.url, ()):
            with suppress(RejectedError):  # it never joined, or was started anew
                await client.control("/destroy_weights_update_group", {"group_name": name})

    return (await ask_each(clients, ask))[1]


async def ask_each(clients: Sequence[RolloutClient], use: Any) -> tuple[dict[str, str], dict[str, str]]:
    """`use` on every server: (url -> why it refused, url -> why it gave no usable answer)."""

    async def ask(client: RolloutClient) -> str:
        try:
            await use(client)
        except RejectedError as error:
            return str(error)
        return ""

    answers, silent = await on_each(clients, ask)
    return {url: why for url, why in answers.items() if why}, silent


def own_address(urls: Sequence[str]) -> str:
    """Where servers reach this machine: the address that it would send to them from."""
    found = []
    for url in urls:
        parts = urlsplit(url)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 80))  # sends nothing
            found.append(probe.getsockname()[0])
    return next((address for address in found if not address.startswith("127.")), "127.0.0.1")
