"""An answer read by SGLang's own parsers, which its servers run by name (`qwen25`, `deepseek-r1`).

For models whose tokenizer has no response template. SGLang keeps a parser per family; this asks for it, and
has none of its own.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mcore_rl.errors import DataError

Parse = Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""sends a path and a body to a server; its reply"""


@dataclass(frozen=True)
class ServerParsers:
    """Names of SGLang's parsers; at least one is given."""

    tool_calls: str | None = None
    reasoning: str | None = None

    async def read(self, text: str, tools: Sequence[Any] | None, parse: Parse) -> dict[str, Any]:
        """The assistant's message that `text` is, without its stop token.

        Raises:
            DataError: the arguments of a call are no JSON object.
            RolloutError, RejectedError: what `parse` raises.
        """
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.reasoning is not None:
            body = {"text": text, "reasoning_parser": self.reasoning}
            found = await parse("/separate_reasoning", body)
            message["content"] = str(found.get("text") or "")
            if reasoning := found.get("reasoning_text"):
                message["reasoning_content"] = str(reasoning)
        if self.tool_calls is not None and tools:
            body = {
                "text": message["content"],
                "tools": [_told(one) for one in tools],
                "tool_call_parser": self.tool_calls,
            }
            found = await parse("/parse_function_call", body)
            if calls := found.get("calls"):
                message["content"] = str(found.get("normal_text") or "")
                message["tool_calls"] = [_call(one) for one in calls]
        return message


def _told(tool: Any) -> dict[str, Any]:
    """What a server is told of a tool: it refuses some fields where they are not of its own types."""
    function = tool.get("function", tool)
    known = {key: function[key] for key in ("name", "description", "parameters") if key in function}
    return {"type": "function", "function": known}


def _call(found: Mapping[str, Any]) -> dict[str, Any]:
    try:
        name, arguments = found["name"], json.loads(found.get("parameters") or "{}")
    except (KeyError, TypeError, ValueError):
        raise DataError("a tool call without a name, or whose arguments are no JSON") from None
    if not (isinstance(name, str) and isinstance(arguments, dict)):
        raise DataError("a tool call without a name, or whose arguments are no object")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
