"""Adapters that servers hold beside the frozen model: which one a request asks for, and what servers need.

A server says nothing of the adapter that it sampled with, and the version of its weights stays that of the
frozen model. So the version of a token is the one whose adapter was asked for. That name is of this process
and this version alone: no other run's adapter, and none of an earlier attempt, can answer to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mcore_rl.errors import ConfigError, RolloutError
from mcore_rl.rollout.reply import Reply
from mcore_rl.terminal import quoted
from mcore_rl.types import VersionSpan

START_WITH = "start it with --enable-lora --max-lora-rank {rank} --lora-target-modules {matrices}"


@dataclass(frozen=True)
class ServedAdapter:
    """The adapter of one version, as servers know it."""

    name: str
    version: str


@dataclass(frozen=True)
class AdapterNeeds:
    """What a server must be started for, to hold the adapters of a run."""

    rank: int
    matrices: tuple[str, ...]
    """last parts of the names of the matrices that have one, such as `q_proj`"""
    versions: int
    """adapters that requests may ask for at a time"""

    def options(self) -> list[str]:
        """The options of SGLang's server."""
        return [
            *("--enable-lora", "--lora-strict-loading", "--max-lora-rank", str(self.rank)),
            *("--max-loras-per-batch", str(self.slots), "--lora-target-modules", *self.matrices),
        ]

    @property
    def slots(self) -> int:
        """Places of a batch: one is that of requests without an adapter, such as a health check."""
        return self.versions + 1


def under(adapter: ServedAdapter, replies: Sequence[Reply], url: str, frozen: dict[str, str]) -> list[Reply]:
    """The replies of a server to a request for `adapter`, each token of which has its version.

    Args:
        frozen: url -> version of the model beside which it is, to which that of the first reply is added.

    Raises RolloutError where that model is another one than before.
    """
    for span in (span for reply in replies for span in reply.versions):
        before = frozen.setdefault(url, span.version)
        if span.version != before:
            raise RolloutError(
                f"{url}: its model was version {quoted(before)}, and is {quoted(span.version)}: somebody "
                "else updated it, and adapters are beside the model that it was started on. Restart it, and "
                "give the run servers of its own"
            )
    return [replace(reply, versions=_whole(adapter.version, len(reply.token_ids))) for reply in replies]


def _whole(version: str, tokens: int) -> tuple[VersionSpan, ...]:
    return (VersionSpan(version, 0, tokens),) if tokens else ()


def check_adapters(url: str, info: Mapping[str, Any], needs: AdapterNeeds) -> None:
    """Raises ConfigError for a server that cannot hold these adapters, by its /server_info.

    A setting that it does not tell is taken as right: the comparison after each publish tells.
    """
    remedy = START_WITH.format(rank=needs.rank, matrices=" ".join(needs.matrices))
    if not info.get("enable_lora"):
        raise ConfigError(
            f'{url}: serves no adapters; {remedy}, or set publish.transport = "disk" for merged weights'
        )
    rank = info.get("max_lora_rank")
    if isinstance(rank, int) and rank < needs.rank:
        raise ConfigError(f"{url}: --max-lora-rank {rank} is below lora.rank = {needs.rank}; {remedy}")
    slots = info.get("max_loras_per_batch")
    if isinstance(slots, int) and slots < needs.slots:
        raise ConfigError(
            f"{url}: --max-loras-per-batch {slots}, and {needs.slots} are needed (the versions that tokens "
            f"may be old, that which serves, and none); start it with --max-loras-per-batch {needs.slots}"
        )
    missing = _missing(needs.matrices, info.get("lora_target_modules"))
    if missing:
        raise ConfigError(f"{url}: has no place for adapters of {', '.join(missing)}; {remedy}")


_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""what SGLang calls matrices that it holds in one"""


def _missing(matrices: Sequence[str], told: Any) -> list[str]:
    if not isinstance(told, list | tuple | set) or "all" in told:
        return []
    return [name for name in matrices if not {name, _FUSED.get(name, name)} & {str(one) for one in told}]


class NoAdapterError(RolloutError):
    """The server does not hold the adapter that was asked for."""


def check_held(url: str, adapter: ServedAdapter, refusal: RolloutError) -> None:
    """Raises NoAdapterError where a server refused a request since it does not know `adapter`."""
    said = str(refusal)
    if "lora" in said.removeprefix(f"{url}/generate").lower():  # an address may have the word too
        raise NoAdapterError(
            f"{url}: does not hold the adapter of version {quoted(adapter.version)} ({said}): it was "
            "restarted, or somebody removed it. Give the run servers of its own"
        ) from refusal
