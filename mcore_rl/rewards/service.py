"""Calls of services that give rewards: JSON over HTTP with retries, a rate limit, and one deadline for all.

A key comes from the environment variable that a configuration names, and never into a message.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp

from mcore_rl.errors import ConfigError
from mcore_rl.rewards.outcome import Void
from mcore_rl.rewards.task import PROCESSES, TIMEOUT
from mcore_rl.terminal import quoted
from mcore_rl.types import Group, Sample

_BACKOFF_SECONDS = 0.25
_BACKOFF_MAX_SECONDS = 8.0
_JITTER = random.SystemRandom()
"""no draw of Python's own generator, which a reward function of the same process may have seeded"""
_MARGIN = 0.9
"""share of reward.timeout that a call may take: a sample is void by itself then, not with its process"""
_LONGEST_REPLY = 1 << 24
_MESSAGE_CHARS = 200
_next_call: dict[str, float] = {}
"""url -> when it may be called again"""


class ServiceError(Exception):
    """There is no usable reply.

    `reason` is that of a void sample: refused, unreachable, failed, reply or timeout.
    """

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


@dataclass(frozen=True)
class Service:
    """Where a service is, and how it is asked."""

    url: str
    key_env: str = ""
    """NAME of the environment variable with its key, sent as `Authorization: Bearer`; empty: none"""
    retries: int = 3
    """attempts after the first, for what another one can help: no connection, 429, 5xx"""
    per_second: float = 0.0
    """calls per second of the whole run, of which each process of its reward pools has its share; 0: any"""
    concurrent: int = 16
    """calls at a time of one process"""

    def __post_init__(self) -> None:
        """Raises ConfigError for what would ask nothing, or wait for ever."""
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url: {quoted(self.url)} is no address; begin it with http:// or https://")
        for name, low in (("retries", 0), ("concurrent", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name}: {quoted(value)}; give an integer of at least {low}")
        if not (isinstance(self.per_second, int | float) and self.per_second >= 0):
            raise ConfigError(f"per_second: {quoted(self.per_second)}; give a number of at least 0")

    async def ask(self, session: aiohttp.ClientSession, body: Mapping[str, Any]) -> Any:
        """The JSON of its answer to a POST of `body`; see `session`.

        Raises:
            ServiceError: there is none within nine tenths of reward.timeout.
            ConfigError: the variable of the key is not set.
        """
        key = _key(self.key_env)
        seconds = _MARGIN * float(os.environ.get(TIMEOUT, "60"))
        last = "no attempt was made"
        try:
            async with asyncio.timeout(seconds):
                for number in range(self.retries + 1):
                    await self._turn()
                    try:
                        return await self._attempt(session, body, key)
                    except (_Transient, aiohttp.ClientError, OSError) as error:
                        reason = "failed" if isinstance(error, _Transient) else "unreachable"
                        last = _shown(str(error) or type(error).__name__, key)
                        wait = max(_backoff(number), getattr(error, "retry_after", 0.0))
                    if number == self.retries:
                        raise ServiceError(reason, f"{self.url}: {last}, {number + 1} times")
                    await asyncio.sleep(wait)
        except TimeoutError:
            pass
        raise ServiceError("timeout", f"{self.url}: no reply within {seconds:g} s (before that: {last})")

    async def _turn(self) -> None:
        """Wait for the next call that the rate allows."""
        if self.per_second <= 0:
            return
        apart = int(os.environ.get(PROCESSES, "1")) / self.per_second
        now = time.monotonic()
        at = max(now, _next_call.get(self.url, now))
        _next_call[self.url] = at + apart
        await asyncio.sleep(at - now)

    async def _attempt(self, session: aiohttp.ClientSession, body: Mapping[str, Any], key: str) -> Any:
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        sent = json.dumps(body, default=str)  # of a parquet file, metadata may hold dates
        async with session.post(self.url, data=sent, headers=headers, allow_redirects=False) as response:
            raw = await response.content.read(_LONGEST_REPLY + 1)
            while len(raw) <= _LONGEST_REPLY and (more := await response.content.read(_LONGEST_REPLY)):
                raw += more
            text = raw[: 4 * _MESSAGE_CHARS].decode(errors="replace")
            said = _shown(f"HTTP {response.status}: {text}", key)
            if response.status == 429 or response.status >= 500:
                raise _Transient(said, response.headers.get("Retry-After", ""))
            if response.status != 200:
                raise ServiceError("refused", f"{self.url}: {said}")
        if len(raw) > _LONGEST_REPLY:
            raise ServiceError("reply", f"{self.url}: a reply of more than {_LONGEST_REPLY >> 20} MiB")
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise ServiceError("reply", f"{self.url}: no JSON: {_shown(text, key)}") from None


class _Transient(Exception):
    def __init__(self, message: str, retry_after: str) -> None:
        super().__init__(message)
        self.retry_after = float(retry_after) if retry_after.strip().isdecimal() else 0.0


Asks = Callable[[Mapping[str, Any]], Awaitable[Any]]
"""the JSON of a service's answer to this body"""


async def each(service: Service, group: Group, score: Callable[[Sample, Asks], Awaitable[Any]]) -> list[Any]:
    """What `score` says of every sample, some at a time; Void for one that the service has no reply to."""
    free = asyncio.Semaphore(service.concurrent)
    async with session() as opened:

        async def one(sample: Sample) -> Any:
            async with free:
                try:
                    return await score(sample, partial(service.ask, opened))
                except ServiceError as error:
                    return Void(error.reason, str(error))

        return list(await asyncio.gather(*map(one, group.samples)))


def session() -> aiohttp.ClientSession:
    """Connections, for an `async with` block; the deadlines are those of Service."""
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


def _key(variable: str) -> str:
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise ConfigError(f"key_env: the environment variable {variable} is not set; export it")
    return key


def _shown(text: str, key: str) -> str:
    """For a message: cut, and without the key, which a service may repeat."""
    return (text.replace(key, "***") if key else text)[:_MESSAGE_CHARS]


def _backoff(attempt: int) -> float:
    return min(_BACKOFF_MAX_SECONDS, _BACKOFF_SECONDS * 2**attempt) * _JITTER.uniform(0.5, 1.0)
