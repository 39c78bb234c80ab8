"""OpenAI's chat completions and completions: requests to conversations, turns to replies and streams.

What a client asks for beside its conversation is checked before, in parameters.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from mcore_rl import strict_json
from mcore_rl.environments.gateway.session import (
    ApiError,
    GatewaySession,
    listed_objects,
    number,
    text_of,
)
from mcore_rl.environments.policy import Turn

ROLES = {"developer": "system"}
"""role of the API -> of chat templates"""


async def chat(session: GatewaySession, body: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to /v1/chat/completions. Raises ApiError."""
    messages = [read_message(one) for one in listed_objects(body, "messages", needed=True)]
    tools = listed_objects(body, "tools") if body.get("tool_choice") != "none" else []
    turn = await session.answer(messages, tools, number(body, "max_completion_tokens", "max_tokens"))
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
    return _reply(session, turn, "chat.completion", "chatcmpl", choice)


async def complete(session: GatewaySession, body: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to /v1/completions, whose prompt is text or token ids. Raises ApiError."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        ids = session.policy.encode(prompt)
    elif isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
        ids = prompt
    else:
        raise ApiError(400, "prompt: expected one text, or a list of token ids")
    turn = await session.policy.generate(ids, max_new_tokens=number(body, "max_tokens"))
    choice: dict[str, Any] = {"index": 0, "text": turn.text, "finish_reason": turn.finish_reason}
    choice["logprobs"] = None
    if body.get("logprobs"):
        scores = _scores(session, turn)
        choice["logprobs"] = {
            "tokens": [one["token"] for one in scores],
            "token_logprobs": [one["logprob"] for one in scores],
        }
    return _reply(session, turn, "text_completion", "cmpl", choice)


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


def chat_events(reply: Mapping[str, Any], *, usage: bool) -> Iterator[Mapping[str, Any]]:
    """The chunks of a streamed chat completion, which was complete before the first."""
    (choice,) = reply["choices"]
    common = {key: reply[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    message = dict(choice["message"])
    calls = message.pop("tool_calls", [])

    def chunk(delta: Mapping[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
        return {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": finish, **more}]}

    yield chunk({"role": message.pop("role"), "content": ""})
    said = {key: value for key, value in message.items() if value}
    if said:
        yield chunk(said, logprobs=choice["logprobs"])
    for index, call in enumerate(calls):
        yield chunk({"tool_calls": [{"index": index, **call}]})
    yield chunk({}, choice["finish_reason"])
    if usage:
        yield {**common, "choices": [], "usage": reply["usage"]}


def complete_events(reply: Mapping[str, Any], *, usage: bool) -> Iterator[Mapping[str, Any]]:
    """The chunks of a streamed completion."""
    yield {key: value for key, value in reply.items() if key != "usage"}
    if usage:
        yield {**reply, "choices": []}


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {
        "error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.code or None}
    }


def _reply(
    session: GatewaySession, turn: Turn, kind: str, prefix: str, choice: Mapping[str, Any]
) -> dict[str, Any]:
    asked, said = len(turn.prompt_ids), len(turn.token_ids)
    return {
        "id": session.reply_id(f"{prefix}-"),
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
