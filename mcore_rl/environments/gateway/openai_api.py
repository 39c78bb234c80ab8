"""OpenAI's chat completions and completions: requests to conversations, turns to replies and streams.

What a client asks for beside its conversation is checked before, in parameters.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mcore_rl import strict_json
from mcore_rl.environments.gateway.session import (
    ApiError,
    GatewaySession,
    function_tool,
    listed_objects,
    number,
    text_of,
)
from mcore_rl.environments.live import LiveTurn, Said
from mcore_rl.environments.policy import Turn

ROLES = {"developer": "system"}
"""role of the API -> of chat templates"""


async def ask_chat(
    session: GatewaySession, body: Mapping[str, Any], name: str, live: LiveTurn | None
) -> Turn:
    """The turn that /v1/chat/completions asks for. Raises ApiError."""
    messages = [read_message(one) for one in listed_objects(body, "messages", needed=True)]
    none = body.get("tool_choice") == "none"
    tools = [] if none else [read_tool(one) for one in listed_objects(body, "tools")]
    return await session.answer(messages, tools, number(body, "max_completion_tokens", "max_tokens"), live)


def chat_reply(session: GatewaySession, body: Mapping[str, Any], name: str, turn: Turn) -> dict[str, Any]:
    """What it is answered with."""
    message, calls = dict(turn.message), []
    for call in turn.tool_calls:
        function = call["function"]
        arguments = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
        named = {"name": function["name"], "arguments": arguments}
        calls.append({"id": session.call_id(), "type": "function", "function": named})
    message["content"] = message.get("content") or (None if calls else "")
    message.pop("tool_calls", None)
    finish = "tool_calls" if calls and turn.finish_reason == "stop" else turn.finish_reason
    choice = {
        "index": 0,
        "message": message | ({"tool_calls": calls} if calls else {}),
        "finish_reason": finish,
        "logprobs": {"content": _scores(session, turn)} if body.get("logprobs") else None,
    }
    return _reply(session, turn, "chat.completion", name, choice)


async def ask_completion(
    session: GatewaySession, body: Mapping[str, Any], name: str, live: LiveTurn | None
) -> Turn:
    """The turn that /v1/completions asks for, whose prompt is text or token ids. Raises ApiError."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        ids = session.policy.encode(prompt)
    elif isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
        ids = prompt
    else:
        raise ApiError(400, "prompt: expected one text, or a list of token ids")
    return await session.policy.generate(ids, max_new_tokens=number(body, "max_tokens"), live=live)


def completion_reply(
    session: GatewaySession, body: Mapping[str, Any], name: str, turn: Turn
) -> dict[str, Any]:
    """What it is answered with."""
    choice: dict[str, Any] = {"index": 0, "text": turn.text, "finish_reason": turn.finish_reason}
    choice["logprobs"] = None
    if body.get("logprobs"):
        scores = _scores(session, turn)
        choice["logprobs"] = {
            "tokens": [one["token"] for one in scores],
            "token_logprobs": [one["logprob"] for one in scores],
        }
    return _reply(session, turn, "text_completion", name, choice)


def read_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat templates have it: arguments of calls are objects."""
    role = message.get("role")
    if not isinstance(role, str):
        raise ApiError(400, "messages: expected a role in each")
    read: dict[str, Any] = {
        "role": ROLES.get(role, role),
        "content": text_of(message.get("content"), "messages.content"),
    }
    read |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    if calls := listed_objects(message, "tool_calls"):
        read["tool_calls"] = [read_call(call) for call in calls]
    return read


def read_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function tool, as it is. Raises ApiError."""
    function_tool(tool.get("function") if tool.get("type") == "function" else None)
    return tool


def read_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call as chat templates have it. Raises ApiError where it has no name, or no JSON object."""
    try:
        function = call["function"]
        text = function["arguments"] or "{}"
        if not isinstance(text, str):
            raise TypeError
        arguments = strict_json.parse(text.encode(), finite=True)
        if not isinstance(function["name"], str) or not isinstance(arguments, dict):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise ApiError(400, "tool_calls: expected a name, and arguments that are a JSON object") from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


class ChatEvents:
    """The chunks of a streamed chat completion."""

    named = False

    def __init__(self, session: GatewaySession, body: Mapping[str, Any], name: str) -> None:
        self._common = _chunk(session, name, "chat.completion.chunk")
        self._usage = _wants_usage(body)

    def begin(self, prompt_tokens: int) -> Iterator[Mapping[str, Any]]:
        """Before anything is said."""
        yield self._chunk({"role": "assistant", "content": ""})

    def say(self, field: str, text: str) -> Iterator[Mapping[str, Any]]:
        """More of a field of the message."""
        yield self._chunk({field: text})

    def end(self, reply: Mapping[str, Any], rest: Sequence[Said]) -> Iterator[Mapping[str, Any]]:
        """What was not said of the whole reply."""
        (choice,) = reply["choices"]
        if rest or choice["logprobs"]:
            yield self._chunk(dict(rest), logprobs=choice["logprobs"])
        for index, call in enumerate(choice["message"].get("tool_calls", [])):
            yield self._chunk({"tool_calls": [{"index": index, **call}]})
        yield self._chunk({}, choice["finish_reason"])
        if self._usage:
            yield {**self._common, "choices": [], "usage": reply["usage"]}

    def fail(self, error: ApiError) -> Iterator[Mapping[str, Any]]:
        """It ends before it is whole."""
        yield error_body(error)

    def _chunk(self, delta: Mapping[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
        return {**self._common, "choices": [{"index": 0, "delta": delta, "finish_reason": finish, **more}]}


class CompletionEvents:
    """The chunks of a streamed completion."""

    named = False

    def __init__(self, session: GatewaySession, body: Mapping[str, Any], name: str) -> None:
        self._common = _chunk(session, name, "text_completion")
        self._usage = _wants_usage(body)

    def begin(self, prompt_tokens: int) -> Iterator[Mapping[str, Any]]:
        """Nothing comes before the text."""
        return iter(())

    def say(self, field: str, text: str) -> Iterator[Mapping[str, Any]]:
        """More of the text."""
        choice = {"index": 0, "text": text, "finish_reason": None, "logprobs": None}
        yield {**self._common, "choices": [choice]}

    def end(self, reply: Mapping[str, Any], rest: Sequence[Said]) -> Iterator[Mapping[str, Any]]:
        """What was not said of the whole reply."""
        (choice,) = reply["choices"]
        yield {**self._common, "choices": [{**choice, "text": dict(rest).get("content", "")}]}
        if self._usage:
            yield {**self._common, "choices": [], "usage": reply["usage"]}

    def fail(self, error: ApiError) -> Iterator[Mapping[str, Any]]:
        """It ends before it is whole."""
        yield error_body(error)


def _chunk(session: GatewaySession, name: str, kind: str) -> dict[str, Any]:
    return {"id": name, "created": int(time.time()), "model": session.model, "object": kind}


def _wants_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {
        "error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.code or None}
    }


def _reply(
    session: GatewaySession, turn: Turn, kind: str, name: str, choice: Mapping[str, Any]
) -> dict[str, Any]:
    asked, said = len(turn.prompt_ids), len(turn.token_ids)
    return {
        "id": name,
        "object": kind,
        "created": int(time.time()),
        "model": session.model,
        "choices": [choice],
        "usage": {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said},
    }


def _scores(session: GatewaySession, turn: Turn) -> list[dict[str, Any]]:
    words = [session.policy.decode([token]) for token in turn.token_ids]
    return [
        {"token": word, "bytes": list(word.encode()), "logprob": score, "top_logprobs": []}
        for word, score in zip(words, turn.log_probs, strict=True)
    ]
