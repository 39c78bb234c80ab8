"""What came in the body of a reply that is not what was asked for, in the words of a message."""

from __future__ import annotations

import json
import re
from typing import Any

from mcore_rl.terminal import escaped, quoted

_MESSAGE_CHARS = 500
_TITLE = re.compile(rb"<title[^>]*>([^<]*)", re.IGNORECASE)


def is_page(raw: bytes) -> bool:
    """Whether it is markup: no API of a rollout server answers so, but proxies and other programs do."""
    return raw.lstrip()[:1] == b"<"


def shown(raw: bytes) -> str:
    """The body of a reply, for a message: of a page its title."""
    if not is_page(raw):
        return escaped(raw[:_MESSAGE_CHARS].decode(errors="replace"))
    title = _TITLE.search(raw[: 1 << 16])
    text = " ".join(title[1].decode(errors="replace").split()) if title else ""
    return f"a page, {quoted(text)}" if text else "a page"


def kind_of(data: Any) -> str:
    """What came in the place of a list of another length, for a message."""
    if isinstance(data, list):
        return f"{len(data)} of them"
    return "nothing" if data is None else message_of(data)


def message_of(data: object) -> str:
    """The beginning of a value, as JSON."""
    return json.dumps(data)[:_MESSAGE_CHARS]
