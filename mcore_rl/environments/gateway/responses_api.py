"""OpenAI's responses, as far as agents with function tools need them: items to conversations and back.

A response may go on from an earlier one by its id: the session keeps the conversation that it ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from mcore_rl.environments.gateway.openai_api import ROLES, read_call
from mcore_rl.environments.gateway.session import (
    ApiError,
    GatewaySession,
    function_tool,
    listed_objects,
    number,
)
from mcore_rl.environments.live import LiveTurn, Said
from mcore_rl.environments.policy import Turn

_TEXTS = ("input_text", "output_text", "text")


async def ask_response(
    session: GatewaySession, body: Mapping[str, Any], name: str, live: LiveTurn | None
) -> Turn:
    """The turn that /v1/responses asks for. Raises ApiError."""
    before = body.get("previous_response_id")
    if before is not None and not (isinstance(before, str) and before in session.responses):
        raise ApiError(400, "previous_response_id: no response of this rollout", param="previous_response_id")
    items = body.get("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    read = read_items(listed_objects({"input": items}, "input", needed=True))
    conversation = [*(session.responses[before] if before is not None else ()), *read]
    instructions = body.get("instructions")
    if not isinstance(instructions, str | None):
        raise ApiError(400, "instructions: expected text", param="instructions")
    said = [{"role": "system", "content": instructions}] if instructions else []
    none = body.get("tool_choice") == "none"
    tools = [] if none else [read_tool(one) for one in listed_objects(body, "tools")]
    turn = await session.answer([*said, *conversation], tools, number(body, "max_output_tokens"), live)
    session.responses[name] = [*conversation, turn.message]
    return turn


def read_items(items: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates have them: the calls of a response belong to its one message."""
    found: list[dict[str, Any]] = []
    for item in items:
        match item.get("type", "message"):
            case "message":
                role = item.get("role")
                if not isinstance(role, str):
                    raise ApiError(400, "input: expected a role in each message")
                content = item.get("content")
                silent = role == "assistant" and content is None  # as a message of calls alone
                said = {"role": ROLES.get(role, role), "content": "" if silent else _text(content, "content")}
                found.append(said)
            case "function_call":
                if not (found and found[-1]["role"] == "assistant"):
                    found.append({"role": "assistant", "content": ""})
                found[-1].setdefault("tool_calls", []).append(read_call({"function": item}))
            case "function_call_output":
                said = {"role": "tool", "content": _text(item.get("output"), "output")}
                found.append(said | {"tool_call_id": str(item.get("call_id", ""))})
            case "reasoning":
                pass  # the answer that it belongs to is known without
            case other:
                raise ApiError(400, f"input: items of type {str(other)[:80]} are not supported")
    return found


def read_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function tool, as chat templates have it. Raises ApiError."""
    if tool.get("type") != "function":
        return function_tool(None)
    return function_tool(
        {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    )


def _text(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if (
            not isinstance(part, dict)
            or part.get("type") not in _TEXTS
            or not isinstance(part.get("text"), str)
        ):
            raise ApiError(400, f"input.{place}: expected text; the policy reads nothing else")
    return "".join(part["text"] for part in parts)


def response_reply(session: GatewaySession, body: Mapping[str, Any], name: str, turn: Turn) -> dict[str, Any]:
    """What it is answered with."""
    cut = turn.finish_reason == "length"
    asked, said = len(turn.prompt_ids), len(turn.token_ids)
    return _asked(session, body, name) | {
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": _output(session, name, turn),
        "usage": {
            "input_tokens": asked,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": said,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": asked + said,
        },
    }


def _output(session: GatewaySession, name: str, turn: Turn) -> list[dict[str, Any]]:
    text = turn.message.get("content") or ""
    items: list[dict[str, Any]] = []
    if text or not turn.tool_calls:
        items.append(_message(f"msg_{name}", "completed", [_part(text)]))
    for call in turn.tool_calls:
        function, call_id = call["function"], session.call_id()
        arguments = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
        its = {"id": f"fc_{call_id}", "call_id": call_id, "status": "completed"}
        items.append({"type": "function_call", "name": function["name"], "arguments": arguments, **its})
    return items


class ResponseEvents:
    """The events of a streamed response."""

    named = True

    def __init__(self, session: GatewaySession, body: Mapping[str, Any], name: str) -> None:
        self._asked = _asked(session, body, name)
        self._place = {"output_index": 0, "item_id": f"msg_{name}"}
        self._text: str | None = None
        """what was said; None before the message begins"""
        self._numbers = count()

    def begin(self, prompt_tokens: int) -> Iterator[Mapping[str, Any]]:
        """Before anything is said."""
        unknown = {"output": [], "usage": None, "incomplete_details": None}
        begun = self._asked | {"status": "in_progress"} | unknown
        yield self._event({"type": "response.created", "response": begun})
        yield self._event({"type": "response.in_progress", "response": begun})

    def say(self, field: str, text: str) -> Iterator[Mapping[str, Any]]:
        """More of the text; the other fields of a message are not of this API."""
        if field == "content":
            yield from self._begin_message()
            self._text = (self._text or "") + text
            delta = {"type": "response.output_text.delta", "delta": text, "logprobs": []}
            yield self._event({**delta, **self._place, "content_index": 0})

    def end(self, reply: Mapping[str, Any], rest: Sequence[Said]) -> Iterator[Mapping[str, Any]]:
        """What was not said of the whole reply."""
        for field, text in rest:
            yield from self.say(field, text)
        if reply["output"][0]["type"] == "message":
            yield from self._begin_message()
        yield from self._end_message()
        calls = [item for item in reply["output"] if item["type"] == "function_call"]
        for index, item in enumerate(calls, int(self._text is not None)):
            added = {**item, "arguments": "", "status": "in_progress"}
            yield self._event({"type": "response.output_item.added", "output_index": index, "item": added})
            for event in _call_events(item, {"output_index": index, "item_id": item["id"]}):
                yield self._event(event)
            yield self._event({"type": "response.output_item.done", "output_index": index, "item": item})
        yield self._event({"type": f"response.{reply['status']}", "response": dict(reply)})

    def fail(self, error: ApiError) -> Iterator[Mapping[str, Any]]:
        """It ends before it is whole."""
        what = {"code": error.code or error.kind, "message": str(error), "param": error.param}
        yield self._event({"type": "error", **what})

    def _begin_message(self) -> Iterator[Mapping[str, Any]]:
        if self._text is not None:
            return
        self._text = ""
        item = _message(self._place["item_id"], "in_progress", [])
        yield self._event({"type": "response.output_item.added", "output_index": 0, "item": item})
        part = {"type": "response.content_part.added", "content_index": 0, "part": _part("")}
        yield self._event({**part, **self._place})

    def _end_message(self) -> Iterator[Mapping[str, Any]]:
        if self._text is None:
            return
        place, part = {**self._place, "content_index": 0}, _part(self._text)
        done = {"type": "response.output_text.done", "text": self._text, "logprobs": []}
        yield self._event({**done, **place})
        yield self._event({"type": "response.content_part.done", **place, "part": part})
        item = _message(self._place["item_id"], "completed", [part])
        yield self._event({"type": "response.output_item.done", "output_index": 0, "item": item})

    def _event(self, event: Mapping[str, Any]) -> dict[str, Any]:
        return {**event, "sequence_number": next(self._numbers)}


def _asked(session: GatewaySession, body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What is known of a response before it is sampled."""
    return {
        "id": name,
        "object": "response",
        "created_at": int(time.time()),
        "error": None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata") or {},
        "model": session.model,
        "parallel_tool_calls": True,
        "previous_response_id": body.get("previous_response_id"),
        "temperature": session.policy.sampling.get("temperature", 1.0),
        "top_p": session.policy.sampling.get("top_p", 1.0),
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(id: Any, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "message", "content": content, "id": id, "role": "assistant", "status": status}


def _call_events(item: Mapping[str, Any], place: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    arguments, kind = item["arguments"], "response.function_call_arguments"
    yield {"type": f"{kind}.delta", **place, "delta": arguments}
    yield {"type": f"{kind}.done", **place, "name": item["name"], "arguments": arguments}
