"""Files of rows, any of which is read by its number: what lies in memory is where each begins.

One JSON object per line is read here; Arrow's files are read in arrow.py.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import weakref
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import repeat
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from mcore_rl import strict_json
from mcore_rl.errors import ChangedFileError, DataError, StorageError

DIGEST_BYTES = 8


class Table(Protocol):
    """The rows of one file."""

    def __len__(self) -> int:
        """How many rows there are."""
        ...

    def place(self, row: int) -> str:
        """`file:line`, or `file:row` counted from 1, for messages."""
        ...

    def number(self, row: int) -> int:
        """The line or row in the file, from 1."""
        ...

    def record(self, row: int) -> Mapping[str, Any]:
        """Its keys and values.

        Raises:
            DataError: it is malformed, or the file was changed since it was opened.
        """
        ...

    def digests(self, rows: range) -> npt.NDArray[np.uint64]:
        """What tells these rows from others: a number for every row or block of rows, in order."""
        ...

    def suspects(self, rows: range, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """Those of the rows that may be malformed, as far as it shows without reading each: in order.

        Args:
            keys: of objects, or of what lies in them (`a.b.c`), that every row must have.
        """
        ...


def temporary(path: Path) -> IO[bytes]:
    """A file without a name for what is unpacked of `path`."""
    try:
        return tempfile.TemporaryFile(prefix="mcore_rl-")
    except OSError as error:
        raise no_room(path, error) from None


def no_room(path: Path, error: OSError) -> StorageError:
    """The error of a temporary file that could not be written."""
    return StorageError(
        f"{path}: no room to unpack it into {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a "
        f"directory "
        "with room, or give an unpacked file"
    )


def kind(value: Any) -> str:
    """What a value of JSON or Arrow is called."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    names |= {int: "number", float: "number", bytes: "byte string"}
    if isinstance(value, float) and not math.isfinite(value):
        return f"number that JSON has not, {value}"
    return names.get(type(value), type(value).__name__)


class Records:
    """The rows of several tables, one after another."""

    def __init__(self, tables: Sequence[tuple[Table, range, str]]) -> None:
        """Args: (table, its rows, the name that its ids begin with, empty where they stand alone)."""
        self._tables = tables
        self._ends = np.cumsum([len(rows) for _, rows, _ in tables])

    def __len__(self) -> int:
        """Rows of all tables."""
        return int(self._ends[-1])

    def place(self, row: int) -> str:
        """`file:line`"""
        table, its, _ = self._find(row)
        return table.place(its)

    def default_id(self, row: int) -> str:
        """The line or row in its file."""
        table, its, _ = self._find(row)
        return str(table.number(its))

    def name(self, row: int) -> str:
        """What its id begins with."""
        return self._find(row)[2]

    def record(self, row: int) -> Mapping[str, Any]:
        """Its keys and values. Raises DataError."""
        table, its, _ = self._find(row)
        return table.record(its)

    def digests(self, rows: range) -> npt.NDArray[np.uint64]:
        """What tells these rows from others, in order."""
        found = [np.zeros(0, np.uint64)]
        return np.concatenate([*found, *(table.digests(its) for table, its, _ in self._within(rows))])

    def suspects(self, rows: range, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """Those of the rows that may be malformed; see Table."""
        found = [np.zeros(0, np.int64)]
        for table, its, offset in self._within(rows):
            found.append(table.suspects(its, keys) + offset)
        return np.concatenate(found)

    def _within(self, rows: range) -> Iterator[tuple[Table, range, int]]:
        """(table, those of its rows that are among `rows`, what makes numbers of all tables of them)."""
        begin = 0
        for table, its, _ in self._tables:
            part = its[max(0, rows.start - begin) : max(0, rows.stop - begin)]
            if part:
                yield table, part, begin - its.start
            begin += len(its)

    def _find(self, row: int) -> tuple[Table, int, str]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        table, rows, name = self._tables[number]
        return table, rows[row - (int(self._ends[number - 1]) if number else 0)], name


_CHUNK = 1 << 23
"""bytes that are read at a time while lines are counted"""
_LINE_FEED, _RETURN, _SPACE_BAR, _OPEN, _CLOSE = b"\n\r {}"
_SPACE = np.frombuffer(b" \t\n\r\x0b\x0c", np.uint8)


class JsonLines:
    """One JSON object per line that is not blank; an index of 8 to 16 bytes a line."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        """Args: (path, its content, which may be closed afterwards). Raises OSError."""
        self._path, self._file = path, os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._stat = _version(self._file)
        starts, ends, blank = _lines_of(self._file)
        if os.pread(self._file, len(BOM_UTF8), 0) == BOM_UTF8:  # which editors of Windows put in front
            starts[0] += len(BOM_UTF8)
        self._starts, self._ends = np.delete(starts, blank), np.delete(ends, blank)
        self._blank = blank

    def __len__(self) -> int:
        """Lines that are not blank."""
        return len(self._starts)

    def place(self, row: int) -> str:
        """`file:line`"""
        return f"{self._path}:{self.number(row)}"

    def number(self, row: int) -> int:
        """The line, from 1."""
        if not len(self._blank):
            return row + 1
        # blank[k] - k of the other lines lie before the k-th blank one
        return row + 1 + int(np.searchsorted(self._blank - np.arange(len(self._blank)), row, side="right"))

    def record(self, row: int) -> Mapping[str, Any]:
        """The object of a line; see Table."""
        place, line = self.place(row), b""
        begin, end = int(self._starts[row]), int(self._ends[row])
        try:
            line = _read(self._file, begin, end)
            changed = _version(self._file) != self._stat
        except OSError as error:
            raise DataError(f"{place}: {error.strerror}; check the file") from None
        if changed or len(line) != end - begin:
            raise ChangedFileError(
                f"{place}: the file was changed since it was opened; start again, and put a new file in its "
                f"place "
                "instead of writing into it"
            )
        try:
            if row == 0 and line.lstrip().startswith(b"["):
                raise DataError(
                    f"{place}: the file is one list of JSON; write an object per line (jq -c '.[]' FILE)"
                )
            record = strict_json.parse(line, unique=True)
        except strict_json.JsonError as error:
            raise DataError(f"{place}: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{place}: a JSON {kind(record)}, expected an object per line; write one")
        return record

    def digests(self, rows: range) -> npt.NDArray[np.uint64]:
        """A digest of every line as it is written; see Table."""
        lines = self._lines(rows)
        joined = b"".join(blake2b(line, digest_size=DIGEST_BYTES).digest() for line in lines)
        return np.frombuffer(joined, np.uint64)

    def suspects(self, rows: range, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """Lines that do not look like an object, are not UTF-8, or where a key does not occur; see Table."""
        quoted = [json.dumps(key.partition(".")[0], ensure_ascii=False).encode() for key in keys]
        found = [np.zeros(0, np.int64)]
        for block in self._blocks(rows):
            first = int(self._starts[block.start])
            data = _read(self._file, first, self._ends[block.stop - 1])
            starts = self._starts[block.start : block.stop] - first
            ends = self._ends[block.start : block.stop] - first
            wrong = _no_objects(data, starts, ends) | _undecodable(data, starts)
            places = starts.tolist(), ends.tolist()
            for key in quoted:
                wrong |= np.fromiter(map(data.find, repeat(key), *places), np.int64, len(block)) < 0
            found.append(np.flatnonzero(wrong) + block.start)
        return np.concatenate(found)

    def _blocks(self, rows: range) -> Iterator[range]:
        """The rows, as many at a time as take about _CHUNK bytes."""
        begin = rows.start
        while begin < rows.stop:
            most = np.searchsorted(self._ends[: rows.stop], int(self._starts[begin]) + _CHUNK) - 1
            end = max(begin, int(most)) + 1
            yield range(begin, end)
            begin = end

    def _lines(self, rows: range) -> Iterator[bytes]:
        for block in self._blocks(rows):
            first = int(self._starts[block.start])
            data = _read(self._file, first, self._ends[block.stop - 1])
            for row in block:
                yield data[self._starts[row] - first : self._ends[row] - first]


def _version(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_mtime_ns, status.st_size


def _lines_of(
    file: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where every line starts and ends, and which lines, from 0, are white space alone."""
    none = np.zeros(0, np.int64)
    starts, ends, spaced, offset, begins = [none], [none], [none], 0, True
    while data := os.pread(file, _CHUNK, offset):
        characters = np.frombuffer(data, np.uint8)
        feeds = np.flatnonzero(characters == _LINE_FEED)
        first = np.append(np.zeros(int(begins), np.int64), feeds[feeds + 1 < len(data)] + 1)
        starts.append(first + offset)
        spaced.append(first[np.isin(characters[first], _SPACE)] + offset)
        ends.append(feeds + offset)
        offset, begins = offset + len(data), data[-1] == _LINE_FEED
    if not begins:  # the last line has no line feed
        ends.append(np.array([offset]))
    all_starts, all_ends = np.concatenate(starts), np.concatenate(ends)
    maybe = np.searchsorted(all_starts, np.concatenate(spaced)).tolist()
    blank = [line for line in maybe if not _read(file, all_starts[line], all_ends[line]).strip()]
    return all_starts, all_ends, np.array(blank, np.int64)


def _no_objects(
    data: bytes, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """[lines] whether one does not stand between { and }, or holds a control character."""
    characters = np.frombuffer(data, np.uint8)
    last = ends - 1
    last = last - (characters[last] == _RETURN)  # lines of Windows
    wrong = (characters[starts] != _OPEN) | (characters[np.maximum(last, 0)] != _CLOSE)
    control = np.flatnonzero((characters < _SPACE_BAR) & (characters != _LINE_FEED) & (characters != _RETURN))
    wrong[np.searchsorted(starts, control, side="right") - 1] = True
    return wrong


def _undecodable(data: bytes, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """[lines] True for the first that is not UTF-8."""
    wrong = np.zeros(len(starts), np.bool_)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        wrong[np.searchsorted(starts, error.start, side="right") - 1] = True
    return wrong


def _read(file: int, begin: Any, end: Any) -> bytes:
    return os.pread(file, int(end) - int(begin), int(begin))
