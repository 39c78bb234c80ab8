"""Environments that can go on after a crash: a class with `state()` and `restore()` beside its `rollout`.

    class Game:
        async def rollout(self, policy, prompt): ...
        def state(self): ...            # plain JSON
        def restore(self, state): ...   # before `rollout`, which goes on from there

What is kept of a rollout is of one moment, when its environment asks for a turn: its own state, and every
turn until then. What was being sampled at that moment is asked again, under the seed that it had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mcore_rl.environments.dialogue import AskedTurn
from mcore_rl.rollout import experts as arrays
from mcore_rl.rollout.reply import Reply
from mcore_rl.rollout.saved import reply_from_json, reply_to_json

_STATE_BYTES = 8 << 20
"""of a state as JSON: a checkpoint holds one for every rollout in flight"""


class StateError(Exception):
    """A session cannot say its state, or cannot go on from one: its rollout is void."""


@dataclass(frozen=True)
class SessionClass:
    """A class of the user's, and the arguments of every session of it."""

    type: Callable[..., Any]
    arguments: Mapping[str, Any]

    @property
    def restorable(self) -> bool:
        """Whether a session can say its state, and go on from one."""
        return hasattr(self.type, "state") and hasattr(self.type, "restore")

    def begin(self) -> Any:
        """A new session. Raises whatever the user's constructor raises."""
        return self.type(**self.arguments)


@dataclass(frozen=True)
class SampledTurn:
    """A turn as it was sampled, with what the dialogue must know to go on from it."""

    ids: list[int]
    reply: Reply
    asked: AskedTurn | None
    """the conversation, where it was one"""
    message: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; token ids as memory."""
        asked = self.asked and {key: getattr(self.asked, key) for key in ("messages", "tools", "text")}
        ids = arrays.to_json(np.array(self.ids, np.int32))
        return {"ids": ids, "reply": reply_to_json(self.reply), "asked": asked, "message": self.message}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> SampledTurn:
        """The turn of `to_json`. Raises KeyError, TypeError, ValueError where it is none."""
        ids, asked = arrays.from_json(saved["ids"]).tolist(), saved["asked"]
        return cls(
            ids,
            reply_from_json(saved["reply"], routed=False),
            None if asked is None else AskedTurn(ids=ids, **asked),
            saved["message"],
        )


@dataclass
class SessionKeeper:
    """The turns of a session that can be restored, and its state when it last asked for one."""

    state: Callable[[], Any]
    turns: list[SampledTurn]
    kept: tuple[Any, int, int] | None = None
    """its state, how many of `turns` there were, how many had been asked for"""

    def keep(self, asked: int) -> None:
        """It asks for turn `asked`. Raises StateError where it cannot be kept."""
        try:
            found = self.state()
            text = json.dumps(found, allow_nan=False)
            strange = _strange_key(found)
        except Exception as error:  # RecursionError and whatever the user's code raises
            what = f"state(): {type(error).__name__}: {error}"
            raise StateError(f"{what}; return objects, lists, texts and finite numbers") from error
        if strange is not None:
            raise StateError(f"state() returned an object with the key {strange}; JSON has texts alone")
        if len(text) > _STATE_BYTES:
            raise StateError(
                f"state() returned {len(text)} characters of JSON, more than {_STATE_BYTES}; keep what is "
                "large elsewhere, and its name in the state"
            )
        self.kept = json.loads(text), len(self.turns), asked

    def to_json(self) -> dict[str, Any] | None:
        """For a checkpoint; None before it has asked for a turn."""
        if self.kept is None:
            return None
        state, count, asked = self.kept
        return {"state": state, "asked": asked, "turns": [one.to_json() for one in self.turns[:count]]}


def _strange_key(value: Any) -> str | None:
    """A key of an object that is no text: JSON would make one of it, and restore would be given another."""
    if isinstance(value, dict):
        for key, one in value.items():
            if not isinstance(key, str):
                return repr(key)[:80]
            if (found := _strange_key(one)) is not None:
                return found
    elif isinstance(value, list | tuple):
        return next((found for one in value if (found := _strange_key(one)) is not None), None)
    return None
