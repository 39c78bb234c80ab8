"""Requests to several servers: each goes to the least-loaded one, and to another when that one is lost."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from mcore_rl.errors import RolloutError
from mcore_rl.rollout.adapters import NoAdapterError, ServedAdapter
from mcore_rl.rollout.client import RejectedError, Reply, RolloutClient
from mcore_rl.rollout.streaming import TokenStream
from mcore_rl.types import ExpertLayers, Prompt

_SLACK = 4
"""prompts in flight more than at the idlest server, for which a request still goes to where its prefix is"""
_HEALTH_POLLS = 4
"""health checks per `health_timeout`"""


@dataclass(frozen=True)
class Request:
    """What one HTTP call asks: prompts, and for each its sampling parameters and its request id."""

    prompts: Sequence[Sequence[int]]
    sampling_params: Sequence[Mapping[str, Any]]
    rids: Sequence[str]
    experts: ExpertLayers | None = None
    """experts of the served model, where its choice of them is asked for"""
    prompt: Prompt | None = None
    """whose ids `prompts` are, where all of them are of one"""
    resumed: Mapping[str, Any] = field(default_factory=dict)
    """of rollouts of an environment that go on after a crash, by their ids: what was saved of them"""
    affinity: str = ""
    """requests of one name go to one server, which has their prefix cached, where that has little to do"""
    stream: TokenStream | None = None
    """who listens to the one response while it is sampled"""


def join(requests: Sequence[Request]) -> Request:
    """One call for all of these, which ask for the experts of one model or for none."""
    return Request(
        prompts=[prompt for request in requests for prompt in request.prompts],
        sampling_params=[params for request in requests for params in request.sampling_params],
        rids=[rid for request in requests for rid in request.rids],
        experts=requests[0].experts,
    )


@dataclass
class _Server:
    client: RolloutClient
    load: int = 0
    """prompts in flight"""
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""
    """it is lost"""
    delivered: float = -math.inf
    """when it last gave a reply"""


def no_server_left(reasons: Mapping[str, str]) -> RolloutError:
    """The end of a run, with each server's url and why that one does not serve."""
    lines = "".join(f"\n  {url}: {why}" for url, why in reasons.items())
    return RolloutError(f"no rollout server is left:{lines}")


class Dispatch:
    """Requests to the servers of `clients` (opened here, closed at the end of the block).

    Requests may run over a publish: `expect` before it, `serve` after it.

    Args:
        clients: the servers that serve.
        version: weight version that they hold.
        health_timeout: seconds without a good health check after which a server is given up.
        lead, leads: which of how many that ask the same servers, and know nothing of each other's requests.
        adapter_of: the adapter of a version, where servers hold adapters beside the frozen model.
    """

    def __init__(
        self,
        clients: Sequence[RolloutClient],
        *,
        version: str,
        health_timeout: float,
        lead: int = 0,
        leads: int = 1,
        adapter_of: Callable[[str], ServedAdapter | None] = lambda _: None,
    ) -> None:
        self.version = version
        self._adapter_of = adapter_of
        self.health_timeout = health_timeout
        self.lost: dict[str, str] = {}
        """url -> why it is not asked any more, of those whom nobody else knows to be lost"""
        self._versions = [version]
        """that tokens may come from: up to `version`, then one that is being published"""
        self._publishing, self._published = False, -math.inf
        """a publish is under way (`expect` was called, `serve` not yet); when the last one ended"""
        self._servers = [_Server(client) for client in clients]
        self._lead, self._leads = lead, leads

    def __len__(self) -> int:
        return len(self._servers)

    async def __aenter__(self) -> Dispatch:
        self._stack = AsyncExitStack()
        for server in self._servers:
            await self._stack.enter_async_context(server.client)
        self._watches = [asyncio.create_task(self._watch(server)) for server in self._servers]
        return self

    def expect(self, clients: Sequence[RolloutClient], version: str) -> None:
        """The publish of `version` begins: tokens may come from it too, of the servers that are not lost.

        What runs on another one, which someone else has lost, moves before the publish ends it there. Health
        checks do not count until `serve`: a paused server does not answer them. A publish has its deadlines.
        """
        self._versions.append(version)
        self._publishing = True
        self.keep(clients, "was lost to another replica")

    async def serve(self, clients: Sequence[RolloutClient], version: str) -> None:
        """`version` is published, and these servers hold it: no others are asked.

        One that was lost meanwhile, and that the publish cannot have known of, stays so.
        """
        self.version = version
        self._publishing, self._published = False, time.monotonic()
        self.keep(clients, f"does not hold weight version {version}")
        left = {server.client.url for server in self._servers if not server.lost.is_set()}
        for client in clients:
            if client.url not in left and client.url not in self.lost:
                await self._stack.enter_async_context(client)
                self._servers.append(_Server(client))
                self._watches.append(asyncio.create_task(self._watch(self._servers[-1])))

    def keep(self, clients: Sequence[RolloutClient], why: str) -> None:
        """Lose all servers but these, as everybody else knows."""
        urls = {client.url for client in clients}
        for server in self._servers:
            if server.client.url not in urls and not server.lost.is_set():
                server.why = why
                server.lost.set()

    async def __aexit__(self, *exc: object) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await self._stack.aclose()

    async def ask(self, request: Request) -> list[Reply]:
        """The replies to `request`, all from one server.

        Their tokens come from the version that serves when the server is asked, or from later ones. A server
        that gives none (connection, deadline, health, or other weights) is lost to all requests, and this one
        goes to another: no reply is ever taken twice.

        Raises:
            RolloutError: every server is lost; the message says why each.
            RejectedError: a server refuses the request, as any other would.
        """
        while True:
            server = self._choose(request)
            server.load += len(request.prompts)
            asked, oldest = self.version, self._versions.index(self.version)
            try:
                replies = await self._from(server, request)
                server.delivered = time.monotonic()
                self._check_version(replies, self._versions[oldest:])
                return replies
            except RejectedError:
                raise
            except RolloutError as error:
                if isinstance(error, NoAdapterError) and asked != self.version:
                    continue  # an attempt came after the publishes that took that version away
                self._lose(server, str(error))
            finally:
                server.load -= len(request.prompts)

    async def parse(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a server's parser makes of a text; the first that answers is taken at its word.

        Raises:
            RejectedError: servers have no such path, as those of other programs than SGLang.
            RolloutError: every server is lost, or none reads the text.
        """
        left = [server for server in self._servers if not server.lost.is_set()]
        if not left:
            raise no_server_left({server.client.url: server.why for server in self._servers})
        for server in left[:-1]:
            with suppress(RolloutError):
                return await server.client.parse(path, body)
        return await left[-1].client.parse(path, body)

    def _choose(self, request: Request) -> _Server:
        """Least load first, then this lead's own share of the servers, and those after it; among equals the
        same one for the same prompt, or of one affinity, whose prefix it has cached.
        """
        left = [server for server in self._servers if not server.lost.is_set()]
        if not left:
            raise no_server_left({server.client.url: server.why for server in self._servers})
        least = min(server.load for server in left)
        prefix = request.affinity.encode() or repr(list(request.prompts[0])).encode()
        about = least + (max(_SLACK, least // 4) if request.affinity else 0)
        count = len(self._servers)
        share, first = max(1, count // self._leads), self._lead * count // self._leads

        def order(index: int) -> tuple[int, bytes]:
            url = self._servers[index].client.url.encode()
            return (index - first) % count // share, hashlib.blake2b(url + prefix, digest_size=8).digest()

        equal = [i for i, s in enumerate(self._servers) if s.load <= about and not s.lost.is_set()]
        return self._servers[min(equal, key=order)]

    async def _from(self, server: _Server, request: Request) -> list[Reply]:
        answer = asyncio.create_task(
            server.client.generate(
                request.prompts,
                request.sampling_params,
                request.rids,
                experts=request.experts,
                session=request.affinity,
                stream=request.stream,
                adapter=self._adapter_of(self.version),
            )
        )
        lost = asyncio.create_task(server.lost.wait())
        try:
            await asyncio.wait({answer, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise RolloutError(server.why)
            return answer.result()
        finally:
            lost.cancel()
            answer.cancel()
            with suppress(asyncio.CancelledError, RolloutError):
                await answer

    def _check_version(self, replies: Sequence[Reply], allowed: Sequence[str]) -> None:
        seen = {span.version for reply in replies for span in reply.versions}
        if seen - set(allowed):
            raise RolloutError(
                f"serves weight version {sorted(seen)}, not {' or '.join(map(repr, allowed))}: it was "
                "restarted, or updated by someone else. Give the run servers of its own"
            )

    def _lose(self, server: _Server, why: str) -> None:
        if not server.lost.is_set():
            server.why = self.lost[server.client.url] = why
            server.lost.set()

    async def _watch(self, server: _Server) -> None:
        """Loses a server that gave no sign of health for `health_timeout`: its connections may stay open.

        A reply is one too: on a busy machine a server may answer requests and no health check.
        """
        pause = self.health_timeout / _HEALTH_POLLS
        last = time.monotonic()
        while time.monotonic() - last < self.health_timeout:
            await asyncio.sleep(pause)
            if server.lost.is_set():
                return
            left = self.health_timeout - (time.monotonic() - last)
            if server.load == 0 or await server.client.healthy(max(left, pause)) or self._publishing:
                last = time.monotonic()
            last = max(last, self._published, server.delivered)
        self._lose(server, f"no good answer to a health check for {self.health_timeout:g} s")
