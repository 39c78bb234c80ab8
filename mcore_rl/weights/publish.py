"""Weights to the rollout servers, by disk: an HF directory that every server loads under a version.

A version is a contract: names and shapes are complete by construction (model/mapping.py), each server is
paused while it loads, and the caller compares log-probs afterwards, since a server may answer 200 to names
that it does not know.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from mcore_rl.errors import RolloutError, WeightSyncError
from mcore_rl.model.build import Model
from mcore_rl.parallel.control import on_main
from mcore_rl.rollout.client import RolloutClient, call
from mcore_rl.rollout.fleet import wait_ready


def publish_by_disk(
    model: Model,
    clients: Sequence[RolloutClient],
    directory: Path,
    version: str,
    superseded: Sequence[str] = (),
) -> None:
    """Export `model` to `directory`/`version` and make every server load it; collective over all ranks.

    The `superseded` versions in `directory` are removed once all servers have the new one.

    Raises:
        WeightSyncError: on every rank, when a server does not take the weights.
    """
    target = directory.resolve() / version
    model.export(target)

    def load() -> None:
        for client in clients:
            _load(client, target, version)
        for old in superseded:  # only what this run wrote: others may share the directory
            shutil.rmtree(directory / old, ignore_errors=True)

    on_main(model.mesh, load)


def _load(client: RolloutClient, target: Path, version: str) -> None:
    async def update(opened: RolloutClient) -> None:
        await opened.pause("retract")  # nothing samples from half-loaded weights
        try:
            await opened.update_weights_from_disk(str(target), version)
        finally:
            await opened.resume()

    try:
        call(client, update)
    except RolloutError as error:
        raise WeightSyncError(
            f"{client.url} did not load version {version} from {target}: {error}. The server must see this "
            "path: set publish.dir to a directory that trainer and servers share"
        ) from error


def server_log_probs(
    client: RolloutClient, sequences: Sequence[Sequence[int]], tag: str
) -> list[list[float]]:
    """Untempered log-probs of every token but the first of each sequence under the server's weights."""

    async def score(opened: RolloutClient):
        params = [{"max_new_tokens": 1, "temperature": 1.0}] * len(sequences)
        rids = [f"probe-{tag}-{i}" for i in range(len(sequences))]
        return await opened.generate(sequences, params, rids, prompt_log_probs=True)

    return [list(reply.prompt_log_probs) for reply in call(client, score)]


def wait_for_servers(clients: Sequence[RolloutClient], timeout: float) -> None:
    """Return when every server is ready; RolloutError names those that are not after `timeout` seconds."""

    async def wait() -> None:
        async with AsyncExitStack() as stack:
            await wait_ready([await stack.enter_async_context(client) for client in clients], timeout=timeout)

    asyncio.run(wait())
