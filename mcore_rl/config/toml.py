"""The two halves of TOML that the standard library lacks: values from a command line, and writing."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def parse_value(text: str) -> Any:
    """A TOML literal (`3`, `1e-6`, `true`, `[1, 2]`, `"x"`), else the string itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # an integer of thousands of digits is a ValueError of its own kind
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def dumps(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """TOML of tables whose values `literal` can write; None is left out, and so is a table without values.

    A value that is a table of tables has each of them under a heading of its own.
    """
    return "\n".join(block for name, table in tables.items() for block in _blocks(_key(name), table))


def _blocks(name: str, table: Mapping[str, Any]) -> Iterator[str]:
    within = {key: value for key, value in table.items() if _is_table_of_tables(value)}
    values = {key: value for key, value in table.items() if value is not None and key not in within}
    if values:
        yield f"[{name}]\n" + "".join(f"{_key(key)} = {literal(value)}\n" for key, value in values.items())
    for key, value in within.items():
        for inner, its in value.items():
            yield from _blocks(f"{name}.{_key(key)}.{_key(inner)}", its)


def _is_table_of_tables(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Mapping) for v in value.values())


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else literal(key)


def literal(value: Any) -> str:
    """A bool, int, finite float, str or Path, or a list or table of these, as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(key)} = {literal(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, (str, Path)):
        # JSON's escapes are TOML's; only DEL, which JSON leaves as it is, must be escaped too.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    raise TypeError(f"{type(value).__name__} has no place in a configuration")
