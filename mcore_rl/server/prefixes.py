"""Keys and values that a conversation goes on from: kept by session, when one of its responses has ended.

The next turn of a session begins with what was computed for the last one, so that only what is new is
prefilled. What is kept is copied out of the rows and bounded in tokens: the session that was longest without
a turn goes first. New weights end all of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

KeysAndValues = list[tuple[Tensor, Tensor]]
"""of every layer, [heads, length, head dim]"""


@dataclass(frozen=True, eq=False)
class Prefix:
    """What was computed for the tokens of a session, all but the last of them."""

    tokens: npt.NDArray[np.int64]
    layers: KeysAndValues

    def shared(self, tokens: npt.NDArray[np.int64]) -> int:
        """How many tokens at the beginning are the same."""
        most = min(len(tokens), len(self.tokens))
        other = (tokens[:most] != self.tokens[:most]).nonzero()[0]
        return int(other[0]) if len(other) else most


class PrefixCache:
    """Prefixes by session, each a branch of its conversation.

    Args:
        capacity: tokens of all of them together.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        """tokens that are kept"""
        self._sessions: OrderedDict[str, list[Prefix]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, session: str, tokens: Sequence[int]) -> tuple[Prefix | None, int]:
        """The prefix that has most of `tokens`, and how many of them."""
        kept = self._sessions.get(session)
        if not kept:
            return None, 0
        self._sessions.move_to_end(session)
        wanted = np.asarray(tokens, np.int64)
        best = max(kept, key=lambda one: one.shared(wanted))
        count = best.shared(wanted)
        return (best, count) if count else (None, 0)

    def keep(self, session: str, tokens: Sequence[int], layers: KeysAndValues) -> None:
        """Keep what was computed for `tokens`; branches that it goes on from are given up for it."""
        if len(tokens) > self.capacity or not tokens:
            return
        new = Prefix(np.asarray(tokens, np.int64), layers)
        before = self._sessions.pop(session, [])
        left = [one for one in before if one.shared(new.tokens) < len(one.tokens)]
        self._sessions[session] = [*left, new]
        self.used += len(new.tokens) - sum(len(one.tokens) for one in before)
        self.used += sum(len(one.tokens) for one in left)
        while self.used > self.capacity:
            self._forget_oldest()

    def clear(self) -> None:
        """Forget everything."""
        self._sessions.clear()
        self.used = 0

    def _forget_oldest(self) -> None:
        """Forget the branch that ended first, of the session that waited longest."""
        session = next(iter(self._sessions))
        branches = self._sessions[session]
        self.used -= len(branches.pop(0).tokens)
        if not branches:
            del self._sessions[session]
