"""The rollout servers of a run: which of them serve, and how one that was lost comes back."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mcore_rl.errors import ConfigError, RolloutError, WeightSyncError
from mcore_rl.rollout.adapters import AdapterNeeds, ServedAdapter, check_adapters
from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.rollout.dispatch import Dispatch
from mcore_rl.rollout.processes import LocalServer
from mcore_rl.terminal import escaped, joined

T = TypeVar("T")

OLDEST_SGLANG = (0, 5, 21)
"""the first with begin/end of a weight update and a version for every span of tokens"""


@dataclass(frozen=True)
class ServerStatus:
    """What all ranks know of the servers."""

    urls: tuple[str, ...]
    lost: Mapping[str, str]
    """url -> why it does not serve"""


class Fleet:
    """Servers of a run. Every rank has one with the same `status`; only the main rank owns processes.

    Args:
        urls: servers in order.
        vocabulary: rows of the policy's vocabulary; a server's token is one of them.
        api_key_env: environment variable with their key.
        timeout: seconds for one call.
        health_timeout: seconds without a good health check after which a server is given up.
        local: the servers started here, in the order of `urls`; empty where they run elsewhere.
        initial: the directory that `local` were started on.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        vocabulary: int,
        api_key_env: str | None = None,
        timeout: float = 600.0,
        health_timeout: float = 60.0,
        local: Sequence[LocalServer] = (),
        initial: Path | None = None,
    ) -> None:
        self.status = ServerStatus(tuple(urls), {})
        self.version = ""
        """the weight version that serves"""
        self.local = list(local)
        self.published: list[Path] = [] if initial is None else [initial]
        """main rank: directories of weights that this run wrote and that may still be read, oldest first"""
        self.released: dict[str, frozenset[str]] = {}
        """url -> parts of its memory (weights, kv_cache) that a serving server has given up; on every rank"""
        self.adapters = ""
        """what the names of adapters begin with, where versions are adapters beside the frozen model"""
        self._former: dict[str, str] = {}
        """url of a server that was started anew -> under which url it was lost, and why"""
        self._restarted: set[str] = set()
        """urls of servers that were started anew and have not been published to yet"""
        self.health_timeout = health_timeout
        self._settings = {"api_key_env": api_key_env, "timeout": timeout, "vocabulary": vocabulary}
        self._settings |= {"frozen": {}}

    def client(self, url: str) -> RolloutClient:
        """A client that is not open yet."""
        return RolloutClient(url, **self._settings)  # type: ignore[arg-type]

    @property
    def serving(self) -> list[RolloutClient]:
        """Clients of the servers that hold the current version."""
        return [self.client(url) for url in self.status.urls if url not in self.status.lost]

    def adapter_of(self, version: str) -> ServedAdapter | None:
        """What servers hold as `version` beside the frozen model; None where they hold whole models."""
        return ServedAdapter(f"{self.adapters}_{version}", version) if self.adapters and version else None

    def dispatch(self, lead: int = 0, leads: int = 1) -> Dispatch:
        """A round of requests to the servers that serve, of which other `leads` have rounds too."""
        return Dispatch(
            self.serving,
            version=self.version,
            health_timeout=self.health_timeout,
            lead=lead,
            leads=leads,
            adapter_of=self.adapter_of,
        )

    def lose(self, lost: Mapping[str, str]) -> None:
        """These servers serve no more until the next publish. All ranks call it with the same servers."""
        self.status = ServerStatus(self.status.urls, {**lost, **self.status.lost})
        self.released = {url: parts for url, parts in self.released.items() if url not in lost}

    # -- on the main rank ---------------------------------------------------------------------------------

    def restart_lost(self) -> ServerStatus:
        """Starts lost servers of this machine anew on the current weights, without waiting for them."""
        for index, server in enumerate(self.local):
            restarted = server.url in self._restarted and _lives(server)
            if server.url in self.status.lost and not restarted:
                server.kill()
                server.model_dir = self.published[-1]
                server.launch()
                self._rename(index, server.url)
                self._restarted.add(server.url)
        return self.status

    def end_lost(self) -> ServerStatus:
        """Ends lost servers of this machine, whose memory is needed; `restart_and_wait` brings them back."""
        for server in self.local:
            if server.url in self.status.lost:
                server.kill()
        return self.status

    def restart_and_wait(self) -> ServerStatus:
        """Restart the lost servers and wait for them; one that does not answer is ended, and stays lost."""
        status = self.restart_lost()
        for server in self.local:
            if server.url in self._restarted:
                try:
                    server.wait()
                except RolloutError:
                    server.kill()
        return status

    def returning(self) -> list[RolloutClient]:
        """Lost servers that answer again, emptied of what they were doing; they are to be published to."""
        starting = {server.url for server in self.local if not _answers(server)}
        lost = [self.client(url) for url in self.status.lost if url not in starting]
        emptied, _ = asyncio.run(on_each(lost, _empty))
        return [client for client in lost if client.url in emptied]

    def mark_published(self, loaded: Collection[str], directory: Path | None = None) -> ServerStatus:
        """After a publish, from `directory` if it was one from disk: these servers hold it and serve."""
        lost = {url: why for url, why in self.status.lost.items() if url not in loaded}
        self.status = ServerStatus(self.status.urls, lost)
        self._restarted.difference_update(loaded)
        self._former = {url: what for url, what in self._former.items() if url not in loaded}
        if directory is not None:
            self._keep(directory)
        return self.status

    def _keep(self, directory: Path) -> None:
        """Remove the versions on disk but for the newest and those that a lost server was started on."""
        self.published.append(directory)
        lost = self.status.lost
        in_use = {directory, *(server.model_dir for server in self.local if server.url in lost)}
        for old in set(self.published) - in_use:  # only what this run wrote: others may share the parent
            shutil.rmtree(old, ignore_errors=True)
        self.published = [path for path in self.published if path in in_use]

    def _rename(self, index: int, url: str) -> None:
        """A restarted server has a new port; the reason why it was lost names the one that it had."""
        urls, lost = list(self.status.urls), dict(self.status.lost)
        before, why = urls[index], lost.pop(urls[index])
        self._former[url] = self._former.pop(before, f"it was {before}, lost because: {why}")
        lost[url] = f"started anew, not published to yet; {self._former[url]}"
        urls[index] = url
        self.status = ServerStatus(tuple(urls), lost)


def _answers(server: LocalServer) -> bool:
    with suppress(RolloutError):
        return server.is_ready()
    return False


def _lives(server: LocalServer) -> bool:
    """Answers, or may still be starting."""
    with suppress(RolloutError):
        server.is_ready()
        return True
    return False


async def _empty(client: RolloutClient) -> None:
    await client.end_pause()  # a paused server is not ready, and what paused it may be gone
    if not await client.ready():
        raise RolloutError(f"{client.url}: not ready")
    await client.abort_all()


async def on_each(
    clients: Sequence[RolloutClient], use: Callable[[RolloutClient], Awaitable[T]]
) -> tuple[dict[str, T], dict[str, str]]:
    """`use` on every server at once: (url -> result, url -> why it failed).

    A server that refuses weights is one that failed, whatever the others answer: its disk may be full, or not
    the one that the others share.
    """

    async def run(client: RolloutClient) -> T:
        async with client:
            return await use(client)

    outcomes = await asyncio.gather(*map(run, clients), return_exceptions=True)
    done: dict[str, T] = {}
    failed: dict[str, str] = {}
    for client, outcome in zip(clients, outcomes, strict=True):
        if isinstance(outcome, RolloutError | WeightSyncError):
            failed[client.url] = str(outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            done[client.url] = outcome
    return done, failed


async def wait_ready(clients: Sequence[RolloutClient], *, timeout: float) -> None:
    """Returns when every (opened) client's server is ready. Raises RolloutError naming those that are not."""
    end = time.monotonic() + timeout
    absent = list(clients)
    while True:
        found = await asyncio.gather(*(client.unready() for client in absent))
        why = {client: problem for client, problem in zip(absent, found, strict=True) if problem is not None}
        absent = list(why)
        if not absent:
            return
        await asyncio.gather(*(client.end_pause() for client in absent))
        if time.monotonic() > end:
            raise RolloutError(f"not ready after {timeout:g} s: {joined(why.values())}")
        await asyncio.sleep(min(1.0, timeout / 10))


async def check_server(
    client: RolloutClient,
    *,
    experts: bool = False,
    releases: bool = False,
    adapters: AdapterNeeds | None = None,
) -> None:
    """Raises ConfigError, with the remedy, for an (opened) server that cannot take part in training.

    Args:
        experts: it must say which experts it sends tokens to.
        releases: it shall give up its memory between rollouts.
        adapters: what it must be able to hold beside the model.
    """
    try:
        info = await client.server_info()
    except RejectedError as error:
        if error.status == 404:
            raise ConfigError(f"{client.url}: no /server_info; {_NEWER}") from error
        raise
    check_server_info(client.url, info, experts=experts)
    if releases:
        check_release(client.url, info)
    if adapters is not None:
        check_adapters(client.url, info, adapters)


_NEWER = f"SGLang {'.'.join(map(str, OLDEST_SGLANG))} or newer is needed"


def check_server_info(url: str, info: Mapping[str, Any], *, experts: bool = False) -> None:
    """Raises ConfigError for settings under which samples or weights would silently be others than meant."""
    if experts and not info.get("enable_return_routed_experts"):
        raise ConfigError(
            f"{url}: does not return routed experts; start it with --enable-return-routed-experts, or set "
            "rollout.routing_replay = false"
        )
    version = str(info.get("version", ""))
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < OLDEST_SGLANG:
        raise ConfigError(f"{url}: runs SGLang {escaped(version) or 'of unknown version'}; {_NEWER}")
    if info.get("dp_size", 1) != 1:
        raise ConfigError(
            f"{url}: dp_size = {escaped(info['dp_size'])}, and SGLang cannot update the weights of such a "
            "server; start several servers without --dp-size and list them in rollout.urls"
        )
    if info.get("preferred_sampling_params"):
        raise ConfigError(
            f"{url}: changes every request by --preferred-sampling-params, and samples would come from "
            "another distribution than the one that is trained; start it without"
        )


def check_release(url: str, info: Mapping[str, Any]) -> None:
    """Raises ConfigError for a server that would answer to a release and keep its memory."""
    if "enable_memory_saver" not in info:
        raise ConfigError(f"{url}: cannot give up its memory; use SGLang, or drop residency.servers")
    if not info["enable_memory_saver"] and info.get("device") != "cpu":  # on a CPU there is none to give
        raise ConfigError(
            f"{url}: would keep its memory when it is asked to give it up; start it with "
            "--enable-memory-saver (rollout.options), or drop residency.servers"
        )
