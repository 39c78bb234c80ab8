"""What every way to the servers has in common: the protocol of a transport, and what servers answer to it.

The transports are weights/disk.py, shared.py and broadcast.py, each of which sends what weights/buckets.py
fills, and weights/adapters.py, which sends adapters alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Protocol

from mcore_rl.errors import RolloutError, WeightSyncError
from mcore_rl.model.build import Model
from mcore_rl.rollout.adapters import AdapterNeeds, ServedAdapter
from mcore_rl.rollout.client import RolloutClient
from mcore_rl.rollout.fleet import Fleet, check_server, on_each, wait_ready


class Transport(Protocol):
    """Publishes the weights of a model to a fleet. Every rank has one."""

    def publish(self, model: Model, fleet: Fleet, version: str) -> dict[str, str]:
        """Every server that answers takes them as `version`; collective over all ranks.

        Returns those that failed (url -> why), which the caller counts as lost.

        Raises:
            WeightSyncError: on every rank, when no server has loaded them.
        """
        ...

    def close(self, fleet: Fleet) -> None:
        """Give back what is kept between publishes; no collective, and no error."""
        ...


def nobody(fleet: Fleet, version: str, failed: Mapping[str, str]) -> WeightSyncError:
    """The error of a publish that reached no server; `failed`: url -> why."""
    reasons = "".join(f"\n  {url}: {why}" for url, why in {**fleet.status.lost, **failed}.items())
    return WeightSyncError(f"no server has loaded version {version}:{reasons}").on_every_rank()


def server_log_probs(
    clients: Sequence[RolloutClient],
    sequences: Sequence[Sequence[int]],
    tag: str,
    adapter: ServedAdapter | None = None,
) -> tuple[dict[str, list[list[float]]], dict[str, str]]:
    """Untempered log-probs of every token but the first of each sequence, under the weights of each server.

    Returns (url -> log-probs, url -> why it gave none). A server that aborts a sequence, for want of memory
    or because somebody asked it to, has not scored it, and counts as one that gave none.

    Args:
        adapter: beside which the weights are asked, where servers hold adapters.
    """

    async def score(opened: RolloutClient) -> list[list[float]]:
        params = [{"max_new_tokens": 1, "temperature": 1.0}] * len(sequences)
        rids = [f"probe-{tag}-{i}" for i in range(len(sequences))]
        replies = await opened.generate(sequences, params, rids, prompt_log_probs=True, adapter=adapter)
        if any(reply.finish_reason == "abort" for reply in replies):
            raise RolloutError(f"{opened.url}: aborted a sequence that it was to score; see its log")
        return [list(reply.prompt_log_probs) for reply in replies]

    return asyncio.run(on_each(clients, score))


def wait_for_servers(
    clients: Sequence[RolloutClient],
    timeout: float,
    *,
    experts: bool = False,
    releases: bool = False,
    adapters: AdapterNeeds | None = None,
) -> None:
    """Return when every server is ready and fit for training.

    Args:
        experts: whether the servers must report the experts that tokens went to.
        releases: whether they must be able to give up their memory.
        adapters: what they must be able to hold beside the model.

    Raises RolloutError naming those that are not ready after `timeout` seconds, ConfigError for one that
    cannot take part.
    """

    async def wait() -> None:
        async with AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(client) for client in clients]
            await wait_ready(opened, timeout=timeout)
            checks = (
                check_server(client, experts=experts, releases=releases, adapters=adapters)
                for client in opened
            )
            await asyncio.gather(*checks)

    asyncio.run(wait())
