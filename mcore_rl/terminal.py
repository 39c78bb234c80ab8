"""Text that a terminal shows: what servers, files and samples wrote stays text.

An escape sequence clears the screen or renames the window, a carriage return or a line feed forges a line of
ours, and a bidirectional control shows a name backwards. `escaped` is for foreign text where it enters a
message; `printable` is for every whole message, where it is printed (tests/test_terminal.py finds the rest).
"""

from __future__ import annotations

import argparse
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of what acts instead of being shown: controls, formats, surrogates, line separators"""

QUOTED_CHARS = 100
"""the most that a message repeats of one value"""
MOST_LISTED = 20
"""the most values that a message lists"""


def escaped(foreign: object) -> str:
    """`str(foreign)` on one line, with what a terminal would act on as Python writes it: `\\x1b`, `\\r`."""
    text = str(foreign)
    if text.isprintable():  # the common case, and no category of _HIDDEN is printable
        return text
    return "".join(_shown(character) for character in text)


def quoted(value: object) -> str:
    """`repr(value)` for a message: on one line, and cut where it is long."""
    return short(repr(value))


def short(foreign: object) -> str:
    """A name that others chose, for a message: escaped, and cut where it is long."""
    text = escaped(foreign)
    return text if len(text) <= QUOTED_CHARS else f"{text[:QUOTED_CHARS]}..."


def listed(names: Iterable[object]) -> str:
    """`['a', 'b']` for a message, of names that others chose: the first few, each cut, and how many more."""
    return f"[{joined(map(quoted, names))}]"


def joined(texts: Iterable[str]) -> str:
    """`a, b`: the first few of many texts for a message, and how many more there are."""
    every = list(texts)
    more = f" and {len(every) - MOST_LISTED} more" if len(every) > MOST_LISTED else ""
    return ", ".join(every[:MOST_LISTED]) + more


def printable(message: object) -> str:
    """A message to print: escaped but for its line feeds, after which no line begins in the first column.

    Our own messages may have several lines. A line feed that foreign text brought along cannot forge a line
    of ours, since every line after the first is indented.
    """
    lines = str(message).split("\n")
    return "\n".join([escaped(lines[0]), *(_indented(escaped(line)) for line in lines[1:])])


class CommandParser(argparse.ArgumentParser):
    """A parser of a command line whose errors repeat arguments so that they stay text; so do its parts."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message("\n".join(map(escaped, message.split("\n"))), file)


def _shown(character: str) -> str:
    if unicodedata.category(character) in _HIDDEN:
        return character.encode("unicode_escape").decode()
    return character


def _indented(line: str) -> str:
    return re.sub(r"^(?=\S)", "  ", line)
