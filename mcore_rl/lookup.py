"""Keys of a row, which may look into objects."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from mcore_rl.errors import DataError
from mcore_rl.terminal import escaped

_KEYS_CHARS = 500
"""of a record's keys, as a message quotes them"""
MISSING = object()
"""what look_up answers where a row has no such key"""


def look_up(record: Mapping[str, Any], key: str) -> Any:
    """The value under `key`, or within objects under `a.b.c`; MISSING where there is none."""
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def missing(place: str, key: str, record: Mapping[str, Any], remedy: str) -> DataError:
    """The error of a row without a key, which says what keys there are beside the part that is missing."""
    value, inside = record, ""
    for part in key.split("."):
        if not isinstance(value.get(part), Mapping):
            break
        value, inside = value[part], f"{inside}{part}."
    have = escaped(", ".join(sorted(map(str, value))))[:_KEYS_CHARS] or "none"
    close = get_close_matches(key.removeprefix(inside), list(map(str, value)), n=1)
    hint = f"did you mean {escaped(inside + close[0])[:_KEYS_CHARS]}? " if close else ""
    where = f"in {escaped(inside.rstrip('.'))}" if inside else "here"
    return DataError(f"{place}:{key}: missing (keys {where}: {have}); {hint}{remedy}")
