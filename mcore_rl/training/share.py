"""Groups from every replica's lead to every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from mcore_rl.parallel.control import gather_replicas, on_leads
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout.columns import pack_groups, unpack_groups
from mcore_rl.types import Group, Prompt

T = TypeVar("T")


def share_groups(
    mesh: Mesh, prompts: Mapping[str, Prompt], work: Callable[[], tuple[list[Group], T]]
) -> tuple[list[Group], list[T]]:
    """Run `work` on the lead of every replica: (scored groups, anything small); collective.

    Returns, the same on every rank, the groups of all replicas, in data-parallel order and without texts,
    and what else each lead returned. An exception on one lead is raised on every rank.

    Args:
        prompts: id -> prompt, of all that the groups of any replica may be of.
    """

    def packed():
        groups, rest = work()
        return pack_groups(groups), rest

    replicas = gather_replicas(mesh, on_leads(mesh, packed))
    groups = [group for columns, _ in replicas for group in unpack_groups(columns, prompts)]
    return groups, [rest for _, rest in replicas]
