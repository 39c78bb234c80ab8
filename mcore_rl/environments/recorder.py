"""The token ids of one rollout: every sampled token is trained once, in the context that it had.

Nothing here reads text. A request whose ids begin with all that a segment holds goes on in it: what is new
are observations. Any other begins a segment, whose whole prompt is context: what it shares with earlier
segments was sampled, and is trained, there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mcore_rl.rollout.reply import Reply
from mcore_rl.types import Prompt, Segment, VersionSpan


@dataclass
class _Sequence:
    """One training sequence as it grows."""

    context: int
    """tokens before the first that is trained here"""
    ids: list[int]
    """all of it"""
    trained: list[bool] = field(default_factory=list)
    """of the tokens behind the context"""
    log_probs: list[float] = field(default_factory=list)
    versions: list[VersionSpan] = field(default_factory=list)

    def continues(self, prompt: Sequence[int]) -> bool:
        return len(self.ids) <= len(prompt) and self.ids == list(prompt[: len(self.ids)])

    def add(self, prompt: Sequence[int], reply: Reply) -> None:
        seen, before = len(prompt) - len(self.ids), len(self.log_probs)
        self.ids = [*prompt, *reply.token_ids]
        self.trained += [False] * seen + [True] * len(reply.token_ids)
        self.log_probs += reply.log_probs
        for version, start, end in reply.versions:
            last = self.versions[-1] if self.versions else None
            if last is not None and last.version == version:
                self.versions[-1] = last._replace(end=before + end)
            else:
                self.versions.append(VersionSpan(version, before + start, before + end))


class TokenRecorder:
    """What was sampled in one rollout, turn by turn; turns of one rollout may be sampled side by side."""

    def __init__(self) -> None:
        self._sequences: list[_Sequence] = []

    def add(self, prompt: Sequence[int], reply: Reply) -> None:
        """`reply` was sampled after the ids of `prompt`."""
        if not reply.token_ids:
            return
        begun = [one for one in self._sequences if one.continues(prompt)]
        if begun:
            best = max(begun, key=lambda one: len(one.ids))
        else:
            best = _Sequence(len(prompt), list(prompt))
            self._sequences.append(best)
        best.add(prompt, reply)

    def segments(self, prompt: Prompt) -> tuple[Segment, ...]:
        """The training sequences in the order in which they began; none where nothing was sampled."""
        return tuple(_segment(one, prompt) for one in self._sequences)


def _segment(one: _Sequence, prompt: Prompt) -> Segment:
    ids = np.array(one.ids, np.int32)
    context, rest = ids[: one.context], ids[one.context :]
    if len(context) == len(prompt.token_array) and (context == prompt.token_array).all():
        context = prompt.token_array  # which every rank has
    return Segment(
        context,
        rest,
        np.array(one.log_probs, np.float32),
        tuple(one.versions),
        None if all(one.trained) else np.array(one.trained, np.bool_),
    )
