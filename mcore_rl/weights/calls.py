"""SGLang's calls around an update of the weights of a server that runs.

One (opened) client each. A publish may meet what an earlier one left, when a trainer or a server broke off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_rl.errors import ConfigError, RolloutError
from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.terminal import escaped
from mcore_rl.weights.plan import Bucket


async def open_update(client: RolloutClient) -> int:
    """Pause the server and let it take weights; returns its tensor-parallel size.

    Retracted, as for an update from disk: what was running goes on without the old weights' cache.

    Raises:
        ConfigError: it cannot be updated so. RolloutError: no usable answer.
    """
    size = _tensor_parallel_size(client.url, await client.server_info())
    await client.pause("retract")
    try:
        await client.control("/begin_weight_update", {})
    except RejectedError:
        # Open already: by a publish that broke off, or by an attempt whose answer was lost.
        await client.control("/end_weight_update", {})
        await client.control("/begin_weight_update", {})
    return size


def _tensor_parallel_size(url: str, info: Mapping[str, Any]) -> int:
    if "embedded" in str(info.get("version", "")):
        raise ConfigError(
            f"{url}: the embedded server loads weights from disk only; use an SGLang server, or set "
            'publish.transport = "disk"'
        )
    if info.get("pp_size", 1) != 1:
        raise ConfigError(
            f"{url}: pp_size = {escaped(info['pp_size'])}, and SGLang gives weights to the first stage only; "
            'start it with --tp-size instead, or set publish.transport = "disk"'
        )
    size = info.get("tp_size", 1)
    if type(size) is not int or size < 1:
        raise RolloutError(f"{url}/server_info: tp_size = {escaped(repr(size))} is no number of ranks")
    return size


async def end_update(client: RolloutClient) -> None:
    """Close the update and end the pause. Raises RolloutError."""
    try:
        await client.control("/end_weight_update", {})
    except RejectedError as error:
        if "no weight-update session" not in str(error):  # else an earlier attempt's answer was lost
            raise
    await client.resume()


def update_body(bucket: Bucket, version: str, *, last: bool) -> dict[str, Any]:
    """What both kinds of update say besides the weights: the version changes, and the cache goes, at the end.

    A cache that is flushed between buckets would be of weights that nobody has published.
    """
    stamp = {"weight_version": version} if last else {}
    return {"load_format": "flattened_bucket", "flush_cache": last, **stamp}
