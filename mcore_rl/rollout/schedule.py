"""Which groups are asked, trained and discarded in each step. Pure: no I/O, no clock.

Version v is the weights after step v, so that step s is trained on weights s - 1 and a token of version v is
then s - 1 - v old. A group's tokens are never older than the version that served when it was asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Discarded = Literal["unfinished", "stale"]
"""why a group is not trained: cut off by the early stop, or finished and too old for the next step"""


@dataclass(frozen=True)
class Batch:
    """What one step does with the groups in flight."""

    trained: tuple[str, ...]
    """ids, in the order in which they were asked"""
    discarded: Mapping[str, Discarded]


class Schedule:
    """The groups in flight, oldest first.

    Step s takes, of the oldest `groups + extra`, the first `groups` to finish. Those left keep generating,
    under new weights too, until no later step could train them. Without `extra` the groups of a step are
    therefore those that were asked for it, in whatever order they finish, and none is ever discarded.

    Args:
        groups: trained per step.
        extra: asked beyond them, so that a step need not wait for the slowest.
        max_staleness: versions that a trained token may be old. With 0 the groups of a step are asked in it,
            and none is in flight between two steps.
    """

    def __init__(self, *, groups: int, extra: int, max_staleness: int) -> None:
        self.groups = groups
        self.extra = extra
        self.max_staleness = max_staleness
        self._asked: dict[str, int] = {}
        """id -> version that served when it was asked; oldest first"""
        self._finished: list[str] = []
        """in the order of finishing"""

    @property
    def in_flight(self) -> Mapping[str, int]:
        """Asked, and neither trained nor discarded: id -> version that served when it was asked."""
        return self._asked

    def wanted(self, steps: int) -> int:
        """Groups to ask now: for this step and `max_staleness` more, as far as `steps` are left."""
        ahead = min(self.max_staleness + 1, steps)
        return max(0, ahead * self.groups + self.extra - len(self._asked))

    def ask(self, ids: Iterable[str], version: int) -> None:
        """These are asked while `version` serves."""
        self._asked |= dict.fromkeys(ids, version)

    def finish(self, group: str) -> None:
        """All samples of this group have arrived."""
        self._finished.append(group)

    def take(self, step: int) -> Batch | None:
        """The batch of `step`, taken out; None as long as too few of its groups have finished."""
        if len(self._finished) < self.groups:  # asked after every group that finishes
            return None
        window = set(list(self._asked)[: self.groups + self.extra])
        first = set([group for group in self._finished if group in window][: self.groups])
        if len(first) < self.groups:
            return None
        finished = set(self._finished)
        trained = tuple(group for group in self._asked if group in first)
        discarded: dict[str, Discarded] = {
            group: "stale" if group in finished else "unfinished"
            for group, version in self._asked.items()
            if group not in first and version < step - self.max_staleness
        }
        for group in (*trained, *discarded):
            del self._asked[group]
        self._finished = [group for group in self._finished if group in self._asked]
        return Batch(trained, discarded)
