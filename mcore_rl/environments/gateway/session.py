"""One rollout as the gateway sees it: its policy, and what a client makes of the answers that it was given.

A client echoes an answer in its own form: without the reasoning, with arguments as text, with ids of calls.
So an answer is known by what every client keeps of it, and takes the place of its echo: the policy then sees
the message that it said, and keeps its ids.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mcore_rl.environments.live import LiveTurn
from mcore_rl.environments.policy import Policy, Turn


class ApiError(Exception):
    """A request that is answered with an error, in the form of its API."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str = "",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param


@dataclass
class GatewaySession:
    """The policy of one rollout, the key that opens it, and its answers by what led to them."""

    policy: Policy
    key: str
    model: str
    remedy: str
    """what to do about a parameter that is refused"""
    ignored: frozenset[str] = frozenset()
    """parameters that have no effect by the environment's own word"""
    requests: set[asyncio.Task[Any]] = field(default_factory=set)
    """being answered; they end with the rollout"""
    left: set[asyncio.Task[Any]] = field(default_factory=set)
    """responses whose client has gone, until what was sampled of them is recorded"""
    calls: int = 0
    """tool calls that were given an id"""
    responses: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    """conversations by the id of the response that they end with, for /v1/responses"""
    _answers: dict[bytes, Mapping[str, Any]] = field(default_factory=dict)

    async def answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        most: int | None,
        live: LiveTurn | None,
    ) -> Turn:
        """The policy's turn after a conversation in the form of chat templates, echoes and all."""
        digest, restored = b"", []
        for message in messages:
            digest = _digest(digest, message)
            restored.append(self._answers.get(digest, message))
        turn = await self.policy.generate(restored, tools=tools, max_new_tokens=most, live=live)
        self._answers[_digest(digest, turn.message)] = turn.message
        if live is not None:  # what was shown may be less than the message, and is what a client echoes
            self._answers[_digest(digest, {**turn.message, "content": live.given(turn.message)})] = (
                turn.message
            )
        return turn

    def call_id(self) -> str:
        """A new id of a tool call."""
        self.calls += 1
        return f"call_{self.calls}"

    @staticmethod
    def reply_id(prefix: str) -> str:
        """A new id of a reply; a count would give replies that were asked for side by side the same."""
        return prefix + uuid.uuid4().hex


def _digest(before: bytes, message: Mapping[str, Any]) -> bytes:
    """The digest of a conversation, by what a client keeps of each message."""
    calls = [
        [call["function"]["name"], call["function"].get("arguments") or {}]
        for call in message.get("tool_calls") or ()
    ]
    kept = [message["role"], message.get("content") or "", calls, message.get("tool_call_id", "")]
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(before + text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def number(body: Mapping[str, Any], *names: str) -> int | None:
    """The first of these fields that is given: a positive integer."""
    for name in names:
        value = body.get(name)
        if value is not None:
            if type(value) is not int or value < 1:
                raise ApiError(400, f"{name}: expected a positive integer")
            return value
    return None


def listed_objects(body: Mapping[str, Any], name: str, *, needed: bool = False) -> list[Mapping[str, Any]]:
    """The field of that name: a list of objects, empty where it may be absent."""
    value = body.get(name)
    if value is None and not needed:
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ApiError(400, f"{name}: expected a list of objects")
    if needed and not value:
        raise ApiError(400, f"{name}: expected at least one")
    return value


def function_tool(function: Any) -> dict[str, Any]:
    """The JSON schema of a tool as chat templates have it, of its name, description and parameters.

    Raises ApiError where it has no name, or a part of another type: a template writes whatever it is given,
    and a parser of the servers refuses it, which would end the run.
    """
    its = function if isinstance(function, dict) else {}
    described, parameters = its.get("description"), its.get("parameters")
    if not isinstance(its.get("name"), str):
        raise ApiError(400, "tools: expected the type function, and a name, in each", param="tools")
    if not isinstance(described, str | None) or not isinstance(parameters, dict | None):
        what = "expected a description that is text, and parameters that are an object"
        raise ApiError(400, f"tools: {what}", param="tools")
    return {"type": "function", "function": its}


def text_of(value: Any, place: str) -> str:
    """Text, or the joined text of a list of text parts; other parts are refused."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(400, f"{place}: expected text; the policy reads nothing else")
    return "".join(part["text"] for part in parts)
