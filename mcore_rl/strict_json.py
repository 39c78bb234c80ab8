"""JSON from outside: read, or refused with one kind of error that says where and what to do about it.

The standard reader raises four kinds of exceptions, of which only one is a JSONDecodeError: bytes that are
not UTF-8, arrays nested deeper than the interpreter's stack, and integers of 4300 digits are the others.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 100
"""objects and arrays within each other; what is deeper could be read and then not be written again"""


class JsonError(ValueError):
    """A text that is no JSON, or none that can be worked with; the message ends with the remedy."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        """line of the text, from 1"""


def parse(text: bytes, *, unique: bool = False, finite: bool = False) -> Any:
    """The value that the UTF-8 `text` holds. Raises JsonError.

    Args:
        unique: a key that an object has twice is an error; else its last value counts.
        finite: so is a number that is not finite, which could not be answered in JSON.
    """
    number = _finite if finite else None
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique if unique else None,
            parse_constant=number,
            parse_float=number,
        )
    except JsonError:
        raise
    except UnicodeDecodeError as error:
        line = 1 + text.count(b"\n", 0, error.start)
        raise JsonError(line, f"byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise JsonError(
            error.lineno, f"not JSON at column {error.colno}: {error.msg}; fix the line"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # the limit of int(), which guards against quadratic time
        raise JsonError(1, "an integer of more than 4300 digits; give it as a string") from None
    if _is_deeper(value, MAX_DEPTH):
        raise _too_deep()
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise JsonError(1, f"the key {twice[:60]!r} is there twice; keep one of them")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(1, f"the number {text[:40]} is not finite; leave it out")
    return value


def _too_deep() -> JsonError:
    return JsonError(1, f"nested too deeply; at most {MAX_DEPTH} levels are read")


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and arrays lie deeper than `levels`; one level after the other, without recursion."""
    level = [value]
    for _ in range(levels + 1):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        if not inner:
            return False
        level = [item for items in inner for item in items]
    return True
