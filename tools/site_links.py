"""A hook of mkdocs: links to files outside docs/, which a site does not have, become their names."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./[^)\s]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page's text, as mkdocs asks for it."""
    return _OUTSIDE.sub(r"\1", markdown)
