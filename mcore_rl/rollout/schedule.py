"""Which groups are asked, taken and discarded in each step. Pure: no I/O, no clock.

Version v is the weights after step v, so that step s is trained on weights s - 1 and a token of version v is
then s - 1 - v old. A group's tokens are never older than the version that served when it was asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

Discarded = Literal["unfinished", "stale"]
"""why a group is not taken: cut off by the early stop, or finished and too old for the next step"""


class Schedule:
    """The groups in flight of one replica, oldest first.

    A step takes, of the oldest that it wants and `extra` more, the first to finish. Those left keep
    generating, under new weights too, until no later step could train them. Without `extra` a step therefore
    takes the oldest, in whatever order they finish, and none is ever discarded.

    Args:
        extra: asked beyond those of the steps, so that a step need not wait for the slowest.
        max_staleness: versions that a trained token may be old. With 0 the groups of a step are asked in it,
            and none is in flight between two steps.
    """

    def __init__(self, *, extra: int, max_staleness: int) -> None:
        self.extra = extra
        self.max_staleness = max_staleness
        self._asked: dict[str, int] = {}
        """id -> version that served when it was asked; oldest first"""
        self._finished: list[str] = []
        """in the order of finishing"""

    @property
    def in_flight(self) -> Mapping[str, int]:
        """Asked, and neither taken nor discarded: id -> version that served when it was asked."""
        return self._asked

    def ask(self, ids: Iterable[str], version: int) -> None:
        """These are asked while `version` serves."""
        self._asked |= dict.fromkeys(ids, version)

    def finish(self, group: str) -> None:
        """All samples of this group have arrived."""
        self._finished.append(group)

    def take(self, groups: int) -> tuple[str, ...] | None:
        """So many groups, in the order in which they were asked; None as long as too few have finished."""
        if len(self._finished) < groups:  # asked after every group that finishes
            return None
        window = set(list(self._asked)[: groups + self.extra])
        first = set([group for group in self._finished if group in window][:groups])
        if len(first) < groups:
            return None
        taken = tuple(group for group in self._asked if group in first)
        self._remove(taken)
        return taken

    def discard(self, step: int) -> Mapping[str, Discarded]:
        """What no step after `step` could train, which has taken its groups; taken out too."""
        finished = set(self._finished)
        discarded: dict[str, Discarded] = {
            group: "stale" if group in finished else "unfinished"
            for group, version in self._asked.items()
            if version < step - self.max_staleness
        }
        self._remove(discarded)
        return discarded

    def _remove(self, groups: Iterable[str]) -> None:
        for group in groups:
            del self._asked[group]
        self._finished = [group for group in self._finished if group in self._asked]


class Queue:
    """The groups in flight of all replicas, oldest first; every rank has the same one.

    What is asked and what is taken follows from it alone, so that it does not depend on how many replicas
    share the work, nor on which of them is the faster.

    Args:
        groups: trained per step.
        extra, max_staleness: as in Schedule, over all replicas.
    """

    def __init__(self, *, groups: int, extra: int, max_staleness: int, replicas: int) -> None:
        self.groups, self.extra, self.max_staleness = groups, extra, max_staleness
        self._replica: dict[str, int] = {}
        """id -> who asked for it; oldest first"""
        self._replicas = replicas

    def __len__(self) -> int:
        return len(self._replica)

    def __iter__(self) -> Iterator[str]:
        return iter(self._replica)

    def wanted(self, steps: int, missing: int) -> int:
        """Groups to ask now, where this step lacks `missing` and `steps` are left, this one among them.

        For this step and for `max_staleness` more, as far as they will come.
        """
        later = min(self.max_staleness, steps - 1) * self.groups
        return max(0, missing + later + self.extra - len(self))

    def spread(self, count: int) -> list[int]:
        """How many of `count` new groups each replica asks for: those that have the fewest come first."""
        loads = [0] * self._replicas
        for replica in self._replica.values():
            loads[replica] += 1
        more = [0] * self._replicas
        for _ in range(count):
            least = min(range(self._replicas), key=lambda replica: loads[replica] + more[replica])
            more[least] += 1
        return more

    def ask(self, groups: Sequence[str], counts: Sequence[int]) -> None:
        """These are asked, by each replica in turn so many."""
        replicas = (replica for replica, count in enumerate(counts) for _ in range(count))
        self._replica |= dict(zip(groups, replicas, strict=True))

    def oldest(self, count: int) -> list[int]:
        """How many of the `count` oldest each replica has."""
        owners = list(self._replica.values())[:count]
        return [owners.count(replica) for replica in range(self._replicas)]

    def remove(self, groups: Iterable[str]) -> None:
        """These were taken or discarded."""
        for group in groups:
            del self._replica[group]
