"""A conversation with its messages apart: from the data's own messages, or by a template's marks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mcore_rl.terminal import escaped

Message = tuple[str, str]
"""(role, text)"""
_ROLE = r"(?P<role>[a-z_]{1,20})"
_MARKS = tuple(
    re.compile(mark, re.DOTALL)
    for mark in (
        rf"<\|im_start\|>{_ROLE}\n(?P<text>.*?)(?:<\|im_end\|>\n?|$)",
        rf"<\|start_header_id\|>{_ROLE}<\|end_header_id\|>\n\n(?P<text>.*?)(?:<\|eot_id\|>|$)",
        rf"<start_of_turn>{_ROLE}\n(?P<text>.*?)(?:<end_of_turn>\n?|$)",
        rf"<\|{_ROLE}\|>\n?(?P<text>.*?)(?=<\|[a-z_]{{1,20}}\|>|$)",
    )
)
"""how templates of ChatML, Llama 3, Gemma, GLM and Phi write a message"""


def messages_of(text: str, messages: Sequence[Mapping[str, Any]] = ()) -> list[Message]:
    """The messages of a prompt; one without a role, where neither the data nor the text has any.

    Args:
        messages: those that the data has. A `content` that is no text is shown as JSON.
    """
    if messages:
        return [(str(one.get("role", "")), _content(one)) for one in messages]
    for mark in _MARKS:
        found = [(match["role"], match["text"]) for match in mark.finditer(text)]
        if found and not mark.sub("", text).strip().replace("<|begin_of_text|>", "").replace("<bos>", ""):
            return found
    return [("", text)]


def chat_html(messages: Sequence[Message], most: int) -> str:
    """The messages below each other, each cut at `most` characters and under its role."""
    return "".join(
        f'<div class="message">{_role(role)}<pre>{escape(escaped_lines(clipped(text, most)))}</pre></div>'
        for role, text in messages
    )


def clipped(text: str, most: int) -> str:
    """The beginning of a text that is too long, and how long it is."""
    return text if len(text) <= most else f"{text[:most]}\u2026 ({len(text):,} characters)"


def escaped_lines(text: str) -> str:
    """Text of others as text: its lines stay, what would act is written out."""
    return "\n".join(map(escaped, text.split("\n")))


def _role(role: str) -> str:
    return f'<span class="role">{escape(escaped(role))}</span>' if role else ""


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "\n".join(str(part["text"]) for part in content)
    rest = {key: value for key, value in message.items() if key != "role"}
    return json.dumps(rest if content is None else content, ensure_ascii=False, default=str)
