"""Files of rows, any of which is read by its number: what lies in memory is where each begins."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from mcore_rl.errors import StorageError

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

    def digests(self, count: int) -> npt.NDArray[np.uint64]:
        """What tells the first `count` rows from others, in order."""
        parts, left = [np.zeros(0, np.uint64)], count
        for table, rows, _ in self._tables:
            if left > 0:
                parts.append(table.digests(rows[:left]))
                left -= len(rows)
        return np.concatenate(parts)

    def suspects(self, rows: range, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """Those of the rows that may be malformed; see Table."""
        found, begin = [np.zeros(0, np.int64)], 0
        for table, its, _ in self._tables:
            of_table = its[max(0, rows.start - begin) : max(0, rows.stop - begin)]
            if of_table:
                found.append(table.suspects(of_table, keys) - its.start + begin)
            begin += len(its)
        return np.concatenate(found)

    def _find(self, row: int) -> tuple[Table, int, str]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        table, rows, name = self._tables[number]
        return table, rows[row - (int(self._ends[number - 1]) if number else 0)], name
