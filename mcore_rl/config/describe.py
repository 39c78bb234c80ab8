"""Every configuration key with its type, default and meaning: for `mcore-rl config` and docs/config.md."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from mcore_rl.config import toml
from mcore_rl.config.config import Config
from mcore_rl.config.file import KEYS, NAMED
from mcore_rl.errors import ConfigError
from mcore_rl.terminal import quoted

_NAMES = {bool: "true or false", int: "integer", float: "number", str: "string", Path: "path"}
_BOUNDS: tuple[tuple[Any, str, str], ...] = (
    (Ge, "ge", ">="),
    (Gt, "gt", ">"),
    (Le, "le", "<="),
    (Lt, "lt", "<"),
)
_HEAD = """# Configuration keys

`mcore-rl config` lists these keys in the terminal, `mcore-rl config SECTION` those of one section, and
`mcore-rl config --markdown` prints this page. A configuration is one TOML file, and `--section.key value` on
the command line overrides a key. Relative paths start at the current directory. A key that is unknown, out of
range or without effect ends the command with exit code 2. What is allowed and hardly meant, such as a
learning rate of 0, is a line at the start of a run and a `warning` event.
"""


def describe(sections: Sequence[str] = ()) -> str:
    """The keys of `sections` (all where none is named) as text for a terminal.

    Raises:
        ConfigError: there is no such section.
    """
    for name in sections:
        if name not in KEYS:
            close = get_close_matches(name, KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the sections are {', '.join(KEYS)}"
            raise ConfigError(f"config: there is no section {quoted(name)}; {hint}")
    lines: list[str] = []
    for table, about, keys in _tables(sections or list(KEYS)):
        lines += ["", f"[{table}]  {about}"]
        for key, kind, default, meaning in _rows(keys):
            lines += [f"  {key} = {default}  ({kind})", f"      {meaning}"]
    return "\n".join(lines[1:])


def as_markdown() -> str:
    """The page docs/config.md."""
    parts = [_HEAD]
    for name, about, keys in _tables(list(KEYS)):
        rows = [
            f"| `{k}` | {kind} | {_code(default)} | {meaning} |" for k, kind, default, meaning in _rows(keys)
        ]
        table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
        parts.append("\n".join([f"## [{name}]", "", about, "", *table, ""]))
    return "\n".join(parts)


def _tables(sections: Sequence[str]) -> Iterator[tuple[str, str, Mapping[str, FieldInfo]]]:
    """(name, what it is, its keys) of the sections, and of the tables in them that a user names."""
    for section in sections:
        annotation = Config.model_fields[section].annotation
        yield section, (getattr(annotation, "__doc__", None) or "").strip(), KEYS[section]
        for place, one in NAMED.items():
            if place.startswith(f"{section}."):
                yield f"{place}.NAME", (one.__doc__ or "").strip(), one.model_fields


def _rows(keys: Mapping[str, FieldInfo]) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of each."""
    for key, field in keys.items():
        kind = kind_of(field.annotation, field.metadata)
        yield key, kind, _default(field), " ".join((field.description or "").split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "unset" if field.default is None else toml.literal(field.default)


def _code(default: str) -> str:
    return default if default in ("required", "unset") else f"`{default}`"


def kind_of(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a value must be, in words: `integer >= 1`, `"fp32", "bf16" or "fp8"`, `list of strings`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        inner = [item for extra in arguments[1:] for item in getattr(extra, "metadata", [extra])]
        return kind_of(arguments[0], inner)
    if origin in (typing.Union, types.UnionType):
        return kind_of(next(a for a in arguments if a is not type(None)), metadata)
    if origin is Literal:
        *first, last = (f'"{value}"' for value in arguments)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is tuple and get_origin(arguments[0]) is Literal:
        return f"list of {kind_of(arguments[0])}"
    if origin is tuple:
        one, _, bounds = kind_of(arguments[0]).partition(" ")
        return f"list of {one}s {bounds}".strip()
    if origin is dict:
        return "table"
    limits = [
        f"{sign} {getattr(item, attribute)}"
        for kind, attribute, sign in _BOUNDS
        for item in metadata
        if isinstance(item, kind)
    ]
    return " ".join([_NAMES[annotation], " and ".join(limits)]).strip()
