"""How much a run asks the servers for, how it asks, and a replica's connections to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mcore_rl.checkpoint import Saved
from mcore_rl.data.cursor import share
from mcore_rl.errors import ConfigError
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.rollout.inflight import InFlight, Player, Schedule
from mcore_rl.rollout.saved import check_group
from mcore_rl.types import ExpertLayers, Tokens

CALLS_PER_SERVER = 4
"""of a round that is all waited for: few, for the servers batch; not one, so that what a lost server had is
not everything"""


@dataclass(frozen=True)
class RolloutSizes:
    """How much is asked; numbers of the run, not of a step."""

    steps: int
    """of the whole run"""
    groups: int
    """trained per step, over all replicas"""
    samples: int
    """per group"""
    extra: int
    """groups in flight beyond those of the steps"""
    max_staleness: int
    """versions that a trained token may be old"""
    most_sampled: int
    """groups that a step may sample to find those with a signal; 0: it trains any group"""
    outlived: Literal["drop", "cut", "finish"]
    """what becomes of a rollout of an environment whose first tokens are too old"""
    by_parts: bool
    """the algorithm compares each part of a reward by itself"""


@dataclass(frozen=True)
class Sampling:
    """How a sample is asked for and read."""

    params: Mapping[str, Any]
    """SGLang's sampling parameters"""
    seed: int
    """the run's; a sample's own follows from it and the sample's id"""
    experts: ExpertLayers | None
    """of the policy, where its routing is replayed"""
    decode: Callable[[Sequence[int] | Tokens], str]
    """a response as text, for rewards"""
    plays: bool
    """an environment makes the samples, each a rollout"""
    streams: bool
    """groups are asked one by one, so that each is scored when it has come; else many in a call, so that a
    server always has the same batches"""


def open_requests(
    mesh: Mesh, fleet: Fleet, sizes: RolloutSizes, timeout: float, player: Player | None = None
) -> InFlight | None:
    """The connections of this rank to the servers, if it is a replica's lead; nothing is asked yet.

    Args:
        timeout: seconds that a lead waits for the groups of a step.
        player: what makes the rollouts of an environment.
    """
    if not mesh.is_replica_lead:
        return None
    extra = share_of(sizes.extra, mesh, mesh.dp_rank)
    outlives, cuts = sizes.outlived != "drop", sizes.outlived == "cut"
    schedule = Schedule(extra=extra, max_staleness=sizes.max_staleness, outlives=outlives)
    dispatch = fleet.dispatch(mesh.dp_rank, mesh.layout.data)
    return InFlight(dispatch, schedule, timeout=timeout, player=player, cuts=cuts)


def check_saved(
    saved: Saved | None, max_staleness: int, vocabulary: int, experts: ExpertLayers | None
) -> None:
    """Whether this run can go on with the groups in flight of its checkpoint.

    Raises:
        ConfigError: they would never be trained by this run.
        DamagedCheckpointError: a sample is none that the policy, of so many rows, can have sampled.
    """
    groups = saved.document["state"].get("ahead", {}).get("groups", []) if saved is not None else []
    if saved is not None and groups and not max_staleness:
        raise ConfigError(
            f"{saved.path} holds {len(groups)} groups of samples in flight, and their prompts would never be "
            "trained: resume with rollout.max_staleness of 1 or more"
        )
    for group in groups:
        check_group(group, vocabulary, experts)


def share_of(count: int, mesh: Mesh, replica: int) -> int:
    """How many of `count` are a replica's."""
    return len(share(range(count), replica, mesh.layout.data))
