"""OpenAI's responses, as far as agents with function tools need them: items to conversations and back.

A response may go on from an earlier one by its id: the session keeps the conversation that it ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from mcore_rl.environments.gateway.openai_api import ROLES, read_call
from mcore_rl.environments.gateway.session import ApiError, GatewaySession, listed_objects, number
from mcore_rl.environments.policy import Turn

_TEXTS = ("input_text", "output_text", "text")


async def respond(session: GatewaySession, body: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to /v1/responses. Raises ApiError."""
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
    turn = await session.answer([*said, *conversation], tools, number(body, "max_output_tokens"))
    name = session.reply_id("resp_")
    session.responses[name] = [*conversation, turn.message]
    return _reply(session, name, turn, body)


def read_items(items: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates have them: the calls of a response belong to its one message."""
    found: list[dict[str, Any]] = []
    for item in items:
        match item.get("type", "message"):
            case "message":
                role = item.get("role")
                if not isinstance(role, str):
                    raise ApiError(400, "input: expected a role in each message")
                found.append(
                    {"role": ROLES.get(role, role), "content": _text(item.get("content"), "content")}
                )
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
    """The JSON schema of a function tool, as chat templates have it."""
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise ApiError(400, "tools: expected the type function, and a name, in each")
    function = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _text(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in _TEXTS or not isinstance(part["text"], str):
            raise ApiError(400, f"input.{place}: expected text; the policy reads nothing else")
    return "".join(part["text"] for part in parts)


def _reply(session: GatewaySession, name: str, turn: Turn, body: Mapping[str, Any]) -> dict[str, Any]:
    cut = turn.finish_reason == "length"
    asked, said = len(turn.prompt_ids), len(turn.token_ids)
    return {
        "id": name,
        "object": "response",
        "created_at": int(time.time()),
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "error": None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata") or {},
        "model": session.model,
        "output": _output(session, name, turn),
        "parallel_tool_calls": True,
        "previous_response_id": body.get("previous_response_id"),
        "temperature": session.policy.sampling.get("temperature", 1.0),
        "top_p": session.policy.sampling.get("top_p", 1.0),
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
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
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        its = {"id": f"msg_{name}", "role": "assistant", "status": "completed"}
        items.append({"type": "message", "content": [part], **its})
    for call in turn.tool_calls:
        function, call_id = call["function"], session.call_id()
        arguments = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
        its = {"id": f"fc_{call_id}", "call_id": call_id, "status": "completed"}
        items.append({"type": "function_call", "name": function["name"], "arguments": arguments, **its})
    return items


def events(reply: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The events of a streamed response, which was complete before the first."""
    for place, event in enumerate(_events(reply)):
        yield {**event, "sequence_number": place}


def _events(reply: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    begun = {**reply, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for index, item in enumerate(reply["output"]):
        place = {"output_index": index, "item_id": item["id"]}
        is_call = item["type"] == "function_call"
        empty = {"arguments": ""} if is_call else {"content": []}
        added = {**item, **empty, "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": index, "item": added}
        yield from _call_events(item, place) if is_call else _text_events(item["content"][0], place)
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    yield {"type": f"response.{reply['status']}", "response": dict(reply)}


def _call_events(item: Mapping[str, Any], place: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    arguments, kind = item["arguments"], "response.function_call_arguments"
    yield {"type": f"{kind}.delta", **place, "delta": arguments}
    yield {"type": f"{kind}.done", **place, "name": item["name"], "arguments": arguments}


def _text_events(part: Mapping[str, Any], place: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    place, text = {**place, "content_index": 0}, part["text"]
    yield {"type": "response.content_part.added", **place, "part": {**part, "text": ""}}
    if text:
        yield {"type": "response.output_text.delta", **place, "delta": text, "logprobs": []}
    yield {"type": "response.output_text.done", **place, "text": text, "logprobs": []}
    yield {"type": "response.content_part.done", **place, "part": part}
