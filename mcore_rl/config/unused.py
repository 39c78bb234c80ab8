"""Keys of the servers that have no effect, and which keys without one would mislead a reader of the file."""

from __future__ import annotations

from collections.abc import Mapping

from mcore_rl.config.sections import PublishConfig, RolloutConfig

_MISLEADING = ("algorithm", "data", "environment", "eval", "model")
"""sections whose keys say what is trained, and on what: one without effect is no oversight to pass by"""
_ALSO_MISLEADING = frozenset(
    {
        *("reward.function", "reward.functions", "reward.model", "publish.mismatch_action", "rollout.dump"),
        *("rollout.max_staleness", "rollout.dynamic_sampling", "rollout.routing_replay"),
    }
)


def misleads(key: str) -> bool:
    """Whether `section.key`, given without effect, would say what the run does not do."""
    return key in _ALSO_MISLEADING or key.partition(".")[0] in _MISLEADING


def unused_of_servers(rollout: RolloutConfig, publish: PublishConfig) -> Mapping[str, str]:
    """Keys of [rollout] and [publish] that have no effect -> why."""
    unused: dict[str, str] = {}
    if rollout.server == "embedded":
        unused["rollout.python"] = 'rollout.server is "embedded", which runs under this interpreter'
    else:
        unused["rollout.threads"] = 'rollout.server is not "embedded"; see rollout.options'
    if not rollout.dump:
        unused["rollout.dump_keep"] = "rollout.dump is 0"
    if not rollout.max_staleness:
        unused["rollout.over_sampling"] = "rollout.max_staleness is 0, and a step waits for all its samples"
    if rollout.urls:
        keys = ("server", "python", "servers", "options", "threads")
        unused |= {f"rollout.{key}": "rollout.urls are servers that already run" for key in keys}
    return {**unused, **_unused_of_transport(publish, urls=bool(rollout.urls))}


def _unused_of_transport(publish: PublishConfig, *, urls: bool) -> Mapping[str, str]:
    if publish.transport == "disk":
        return {"publish.bucket_mib": 'publish.transport is "disk"'}
    if publish.transport == "adapter":
        why = 'publish.transport is "adapter", which sends files of adapters'
        return {"publish.bucket_mib": why, "publish.replica": f"{why}: they are small"}
    why = f'publish.transport is "{publish.transport}", which writes no files'
    return dict.fromkeys(("publish.replica", *(["publish.dir"] if urls else [])), why)
