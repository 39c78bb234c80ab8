"""Weights to the rollout servers, by disk: an HF directory that every server loads under a version.

A version is a contract: names and shapes are complete by construction (model/mapping.py), each server is
paused while it loads, and the caller compares log-probs afterwards, since a server may answer 200 to names
that it does not know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from safetensors import safe_open

from mcore_rl.errors import RolloutError, WeightSyncError
from mcore_rl.model.build import Model
from mcore_rl.model.hf_files import checkpoint_files
from mcore_rl.model.quantize import quantized_shapes
from mcore_rl.parallel.control import on_main
from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.rollout.fleet import Fleet, check_server, on_each, wait_ready


def publish_by_disk(
    model: Model, fleet: Fleet, directory: Path, version: str, *, quantized: bool = False
) -> dict[str, str]:
    """Export `model` to `directory`/`version` and make every server load it; collective over all ranks.

    Args:
        quantized: in FP8 (model.quantize), which the servers must have been started with.

    Servers that were lost and answer again are published to like the others, and serve from then on. Returns
    those that failed (url -> why), which the caller counts as lost. Older versions are removed.

    Raises:
        WeightSyncError: on every rank, when a server refuses the weights, or none is left that has them.
    """
    target = directory.resolve() / version
    model.export(target, quantized=quantized)
    expected = model.mapping.hf_shapes()
    expected = quantized_shapes(expected) if quantized else expected
    failed = on_main(model.mesh, lambda: publish_directory(fleet, target, version, expected))
    fleet.status = on_main(model.mesh, lambda: fleet.status)
    fleet.version = version
    return failed


def publish_directory(
    fleet: Fleet, target: Path, version: str, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The main rank's part of publish_by_disk: servers load `target`, if it holds the tensors `expected`."""
    _check_complete(target, expected)
    clients = [*fleet.serving, *fleet.returning()]
    loaded, failed = asyncio.run(on_each(clients, lambda client: load_from_disk(client, target, version)))
    if not loaded:
        raise nobody(fleet, version, failed)
    fleet.mark_published(loaded, target)
    return failed


def nobody(fleet: Fleet, version: str, failed: Mapping[str, str]) -> WeightSyncError:
    """The error of a publish that reached no server; `failed`: url -> why."""
    reasons = "".join(f"\n  {url}: {why}" for url, why in {**fleet.status.lost, **failed}.items())
    return WeightSyncError(f"no server has loaded version {version}:{reasons}").on_every_rank()


def _check_complete(target: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Before any server is told: SGLang ignores a name that it does not know, and dies of a wrong shape."""
    found: dict[str, tuple[int, ...]] = {}
    for file in set(checkpoint_files(target).values()):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    wrong = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if wrong:
        lines = "".join(f"\n  {name}: {found.get(name)}, not {expected.get(name)}" for name in wrong[:5])
        raise WeightSyncError(
            f"{target}: {len(wrong)} tensors are not those of the model; no server was told. Something else "
            f"writes to this directory (publish.dir), or its disk is full:{lines}"
        )


async def load_from_disk(client: RolloutClient, target: Path, version: str) -> None:
    """Make one (opened) server load the HF directory `target` as `version`.

    Paused, so that nothing is sampled from half-loaded weights; retracted, so that what was running goes on
    without the cache of the old ones (pausing in place, the server would keep it, or refuse to flush it).

    Raises:
        WeightSyncError: the server refuses the weights. RolloutError: it gave no usable answer, and stays
            paused: to wait for another deadline helps nobody, and `Fleet.returning` resumes who comes back.
    """
    await client.pause("retract")
    try:
        await client.update_weights_from_disk(str(target), version)
    except RejectedError as error:
        await client.resume()
        raise WeightSyncError(
            f"{client.url} did not load version {version} from {target}: {error}. The server must see this "
            "path: set publish.dir to a directory that trainer and servers share"
        ) from error
    await client.resume()


def server_log_probs(
    clients: Sequence[RolloutClient], sequences: Sequence[Sequence[int]], tag: str
) -> tuple[dict[str, list[list[float]]], dict[str, str]]:
    """Untempered log-probs of every token but the first of each sequence, under the weights of each server.

    Returns (url -> log-probs, url -> why it gave none). What a server aborted, for want of memory or because
    somebody asked it to, it has not scored.
    """

    async def score(opened: RolloutClient) -> list[list[float]]:
        params = [{"max_new_tokens": 1, "temperature": 1.0}] * len(sequences)
        rids = [f"probe-{tag}-{i}" for i in range(len(sequences))]
        replies = await opened.generate(sequences, params, rids, prompt_log_probs=True)
        if any(reply.finish_reason == "abort" for reply in replies):
            raise RolloutError(f"{opened.url}: aborted a sequence that it was to score; see its log")
        return [list(reply.prompt_log_probs) for reply in replies]

    return asyncio.run(on_each(clients, score))


def wait_for_servers(
    clients: Sequence[RolloutClient], timeout: float, *, experts: bool = False, releases: bool = False
) -> None:
    """Return when every server is ready and fit for training.

    Args:
        experts: for routing replay too.
        releases: and to give up its memory.

    Raises RolloutError naming those that are not ready after `timeout` seconds, ConfigError for one that
    cannot take part.
    """

    async def wait() -> None:
        async with AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(client) for client in clients]
            await wait_ready(opened, timeout=timeout)
            checks = (check_server(client, experts=experts, releases=releases) for client in opened)
            await asyncio.gather(*checks)

    asyncio.run(wait())
