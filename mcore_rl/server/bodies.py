"""Bodies of requests and replies, read and written in pieces: none of them holds the event loop.

Python's own JSON parser and writer keep the interpreter for a whole body, in whatever thread they run, and
8 MiB of empty lists take a second. So a body that is not small goes through `_Decoder`, and a reply through
`encode`: both hand the interpreter to other threads every few milliseconds. What a body may hold is bounded
as well, since validating and releasing it cannot be interrupted.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import Executor
from json.decoder import JSONArray, JSONObject  # pyright: ignore[reportAttributeAccessIssue]
from json.scanner import py_make_scanner  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

from aiohttp import web

BODY_SECONDS = 60.0
"""From a request's headers to the end of its body."""
REPLY_SECONDS = 60.0
"""Until a client has taken a whole reply: one that does not read would keep it here for good."""
MAX_VALUES = 1 << 20
"""Token ids, characters of text or other values of a request: validating as many takes 40 ms."""
_MAX_CONTAINERS = 1 << 16
_SMALL_BYTES = 1 << 16
"""What the event loop parses itself, in a few milliseconds at most."""
_PIECE = 256
"""Entries of a list that are written in one go."""
_MAX_KEYS = 1 << 17
_SPACE = "[ \t\n\r]{0,16}"
"""Bounded: a search through all blanks could not be interrupted."""
_INTEGERS = re.compile(f"(?:{_SPACE}(?:0|-?[1-9][0-9]{{0,17}}){_SPACE},){{1,4096}}")
_END_OF_ARRAY = re.compile(r"[ \t\n\r]*\]")

ScanOnce = Callable[[str, int], tuple[Any, int]]


class MalformedBodyError(ValueError):
    """The body is not a JSON object of the right form: HTTP 400 {"object": "error", ...}."""


class _Decoder(json.JSONDecoder):
    """Parses in Python, a run of integers at a time, and counts what it finds."""

    def __init__(self) -> None:
        super().__init__(parse_constant=_no_constant)
        self._values = self._containers = self._keys = 0
        self.parse_array, self.parse_object = self._array, self._object
        self.scan_once = py_make_scanner(self)

    def _array(self, state: tuple[str, int], scan_once: ScanOnce) -> tuple[list[Any], int]:
        text, end = state
        self._count(containers=1)
        values: list[Any] = []
        while run := _INTEGERS.match(text, end):
            found = [int(digits) for digits in run[0][:-1].split(",")]
            self._count(values=len(found))
            values += found
            end = run.end()
        if values and _END_OF_ARRAY.match(text, end):
            raise json.JSONDecodeError("a value is missing after a comma", text, end)
        rest, end = JSONArray((text, end), self._counted(scan_once, values=1))
        return values + rest, end

    def _object(self, state: tuple[str, int], strict: bool, scan_once: ScanOnce, *rest: Any) -> Any:
        self._count(containers=1)
        return JSONObject(state, strict, self._counted(scan_once, keys=1), *rest)

    def _counted(self, scan_once: ScanOnce, **what: int) -> ScanOnce:
        def scan(text: str, index: int) -> tuple[Any, int]:
            self._count(**what)
            return scan_once(text, index)

        return scan

    def _count(self, values: int = 0, containers: int = 0, keys: int = 0) -> None:
        self._values += values
        self._containers += containers
        self._keys += keys
        found = (self._values, self._containers, self._keys)
        if any(n > most for n, most in zip(found, (MAX_VALUES, _MAX_CONTAINERS, _MAX_KEYS), strict=True)):
            raise MalformedBodyError(
                f"the body holds more than {MAX_VALUES} values, {_MAX_CONTAINERS} lists and objects or "
                f"{_MAX_KEYS} fields; send fewer sequences in one request"
            )


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")


async def read_json(request: web.Request, executor: Executor) -> dict[str, Any]:
    """The fields of the body; an empty one has none.

    Raises MalformedBodyError unless the body is a JSON object, HTTPRequestTimeout when it comes too late.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            raw = await request.read()
    except TimeoutError as error:
        raise web.HTTPRequestTimeout(reason=f"the body took more than {BODY_SECONDS:g} s") from error
    if not raw:
        return {}
    if len(raw) <= _SMALL_BYTES:
        return parse_json(raw)
    return await asyncio.get_running_loop().run_in_executor(executor, parse_json, raw)


def parse_json(raw: bytes) -> dict[str, Any]:
    """Raises MalformedBodyError unless `raw` is a JSON object that holds no more than a request may."""
    try:
        text = raw.decode()
        small = len(raw) <= _SMALL_BYTES
        body = json.loads(text, parse_constant=_no_constant) if small else _Decoder().decode(text)
    except MalformedBodyError:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedBodyError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise MalformedBodyError(f"the body must be a JSON object, got {type(body).__name__}")
    return body


def encode(value: Any) -> str:
    """The JSON of `value`; a long list is written in pieces."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {encode(item)}" for key, item in value.items()) + "}"
    if not isinstance(value, list):
        return json.dumps(value)
    if _is_deep(value):
        return "[" + ", ".join(map(encode, value)) + "]"
    pieces = (json.dumps(value[i : i + _PIECE])[1:-1] for i in range(0, len(value), _PIECE))
    return "[" + ", ".join(pieces) + "]"


def _is_deep(value: list[Any]) -> bool:
    """Whether entries are objects, or lists of lists: the last is looked at, since a first may be null."""
    last = value[-1] if value else None
    return isinstance(last, dict) or (isinstance(last, list) and bool(last) and isinstance(last[0], list))
