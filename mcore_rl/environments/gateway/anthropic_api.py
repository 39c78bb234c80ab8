"""Anthropic's messages: blocks to conversations, turns to blocks and events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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


async def ask_message(
    session: GatewaySession, body: Mapping[str, Any], name: str, live: LiveTurn | None
) -> Turn:
    """The turn that /v1/messages asks for. Raises ApiError."""
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
    return await session.answer(conversation, tools, most, live)


def message_reply(session: GatewaySession, body: Mapping[str, Any], name: str, turn: Turn) -> dict[str, Any]:
    """What it is answered with."""
    content: list[dict[str, Any]] = []
    if text := turn.message.get("content") or "":
        content.append({"type": "text", "text": text})
    for call in turn.tool_calls:
        function = call["function"]
        its = {"name": function["name"], "input": function.get("arguments") or {}}
        content.append({"type": "tool_use", "id": session.call_id(), **its})
    stop = "max_tokens" if turn.finish_reason == "length" else "end_turn"
    return {
        "id": name,
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
    """The JSON schema of a tool, as chat templates have it. Raises ApiError."""
    name, schema = tool.get("name"), tool.get("input_schema")
    if not isinstance(schema, dict):
        raise ApiError(400, "tools: expected a name and an input_schema in each")
    return function_tool({"name": name, "description": tool.get("description") or "", "parameters": schema})


class MessageEvents:
    """The events of a streamed message."""

    named = True

    def __init__(self, session: GatewaySession, body: Mapping[str, Any], name: str) -> None:
        self._name, self._model = name, session.model
        self._open = False
        """its text has begun"""

    def begin(self, prompt_tokens: int) -> Iterator[Mapping[str, Any]]:
        """Before anything is said."""
        its = {"id": self._name, "type": "message", "role": "assistant", "model": self._model, "content": []}
        usage = {"input_tokens": prompt_tokens, "output_tokens": 0}
        ended = {"stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": {**its, **ended, "usage": usage}}

    def say(self, field: str, text: str) -> Iterator[Mapping[str, Any]]:
        """More of the text; the other fields of a message are not of this API."""
        if field != "content":
            return
        if not self._open:
            self._open = True
            block = {"type": "text", "text": ""}
            yield {"type": "content_block_start", "index": 0, "content_block": block}
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}

    def end(self, reply: Mapping[str, Any], rest: Sequence[Said]) -> Iterator[Mapping[str, Any]]:
        """What was not said of the whole reply."""
        for field, text in rest:
            yield from self.say(field, text)
        if self._open:
            yield {"type": "content_block_stop", "index": 0}
        calls = [block for block in reply["content"] if block["type"] == "tool_use"]
        for index, block in enumerate(calls, int(self._open)):
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
            yield {"type": "content_block_start", "index": index, "content_block": {**block, "input": {}}}
            yield {"type": "content_block_delta", "index": index, "delta": delta}
            yield {"type": "content_block_stop", "index": index}
        ended = {"stop_reason": reply["stop_reason"], "stop_sequence": None}
        usage = {"output_tokens": reply["usage"]["output_tokens"]}
        yield {"type": "message_delta", "delta": ended, "usage": usage}
        yield {"type": "message_stop"}

    def fail(self, error: ApiError) -> Iterator[Mapping[str, Any]]:
        """It ends before it is whole."""
        yield error_body(error)


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in Anthropic's form."""
    return {"type": "error", "error": {"type": error.kind, "message": str(error)}}
