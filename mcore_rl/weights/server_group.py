"""A process group of one rank here, the source, and the ranks of one rollout server in their own processes.

Made as SGLang makes its side (torch's helper for groups outside of the world), over a store of its own.
"""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed import distributed_c10d as c10d

from mcore_rl.errors import RolloutError
from mcore_rl.rollout.client import RejectedError, RolloutClient

_POLL_SECONDS = 0.001


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
