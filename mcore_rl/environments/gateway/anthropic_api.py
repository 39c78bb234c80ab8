"""Anthropic's messages: blocks to conversations, turns to blocks and events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mcore_rl.environments.gateway.session import (
    ApiError,
    GatewaySession,
    listed_objects,
    number,
    text_of,
)


async def messages(session: GatewaySession, body: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to /v1/messages. Raises ApiError."""
    most = number(body, "max_tokens")
    if most is None:
        raise ApiError(400, "max_tokens: expected a positive integer")
    conversation: list[dict[str, Any]] = []
    if system := text_of(body.get("system"), "system"):
        conversation.append({"role": "system", "content": system})
    for one in listed_objects(body, "messages", needed=True):
        conversation += read_message(one)
    none = body.get("tool_choice") == {"type": "none"}
    tools = [] if none else [read_tool(one) for one in listed_objects(body, "tools")]
    turn = await session.answer(conversation, tools, most)
    content: list[dict[str, Any]] = []
    if text := turn.message.get("content") or "":
        content.append({"type": "text", "text": text})
    for call in turn.tool_calls:
        function = call["function"]
        its = {"name": function["name"], "input": function.get("arguments") or {}}
        content.append({"type": "tool_use", "id": session.call_id(), **its})
    stop = "max_tokens" if turn.finish_reason == "length" else "end_turn"
    return {
        "id": session.reply_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": session.model,
        "content": content,
        "stop_reason": "tool_use" if turn.tool_calls and stop == "end_turn" else stop,
        "stop_sequence": None,
        "usage": {"input_tokens": len(turn.prompt_ids), "output_tokens": len(turn.token_ids)},
    }


def read_message(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages, as chat templates have them, of one of the API: its tool results are messages there."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise ApiError(400, "messages: expected a role in each, user or assistant")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    texts, calls, results = [], [], []
    for block in listed_objects(message, "content", needed=True):
        match block.get("type"):
            case "tool_use":
                name, its = block.get("name"), block.get("input")
                if not isinstance(name, str) or not isinstance(its, dict):
                    raise ApiError(400, "tool_use: expected a name and an input that is an object")
                calls.append({"type": "function", "function": {"name": name, "arguments": its}})
            case "tool_result":
                said = {"role": "tool", "content": text_of(block.get("content"), "tool_result.content")}
                results.append(said | {"tool_call_id": str(block.get("tool_use_id", ""))})
            case "thinking" | "redacted_thinking":
                pass  # the answer that it belongs to is known without
            case _:
                texts.append(text_of([block], "messages.content"))
    found: list[dict[str, Any]] = list(results)
    if texts or calls:
        found.append({"role": role, "content": "".join(texts)} | ({"tool_calls": calls} if calls else {}))
    return found


def read_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a tool, as chat templates have it."""
    name, schema = tool.get("name"), tool.get("input_schema")
    if not isinstance(name, str) or not isinstance(schema, dict):
        raise ApiError(400, "tools: expected a name and an input_schema in each")
    function = {"name": name, "description": str(tool.get("description") or ""), "parameters": schema}
    return {"type": "function", "function": function}


def events(reply: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The events of a streamed reply, which was complete before the first."""
    usage = {**reply["usage"], "output_tokens": 0}
    yield {
        "type": "message_start",
        "message": {**reply, "content": [], "stop_reason": None, "usage": usage},
    }
    for index, block in enumerate(reply["content"]):
        if block["type"] == "text":
            empty, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            empty = {**block, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    ended = {"stop_reason": reply["stop_reason"], "stop_sequence": None}
    yield {
        "type": "message_delta",
        "delta": ended,
        "usage": {"output_tokens": reply["usage"]["output_tokens"]},
    }
    yield {"type": "message_stop"}


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in Anthropic's form."""
    return {"type": "error", "error": {"type": error.kind, "message": str(error)}}
