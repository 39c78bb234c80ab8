"""Rows of Arrow: parquet files, and the directories that `datasets` saves, memory-mapped."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mcore_rl.data.tables import DIGEST_BYTES, no_room, temporary
from mcore_rl.errors import DataError

_BLOCK = 1024
"""rows that have a digest together, and reads after which memory is given back"""
_FAILURES = (ValueError, OverflowError, TypeError, KeyError, pa.ArrowException)
"""what pyarrow raises for a file that is none, besides OSError"""


class ArrowRows:
    """Batches of rows in memory that the system maps to files; a row is made when it is asked for."""

    def __init__(
        self, path: Path, maps: Sequence[mmap.mmap], batches: Sequence[pa.RecordBatch], schema: pa.Schema
    ) -> None:
        self._path, self._maps, self._schema = path, maps, schema
        self._batches = [batch for batch in batches if len(batch)]
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)
        self._reads = 0
        self._forget()

    @classmethod
    def of_parquet(cls, path: Path) -> ArrowRows:
        """The rows of a parquet file; see tables.open_table."""
        what = "check that it is a readable parquet file"
        try:
            with path.open("rb"):
                pass
            source = pq.ParquetFile(path)
            schema = source.schema_arrow.remove_metadata()
            if len({*schema.names}) < len(schema.names):
                raise DataError(f"{path}: two columns of one name; rename one")
            read = source.iter_batches(batch_size=_BLOCK)
            with temporary(path) as file:
                with pa.ipc.new_file(_Sink(path, file), schema) as writer:
                    for batch in read:
                        writer.write_batch(batch.replace_schema_metadata(None))
                memory = _flushed(path, file)
        except (OSError, *_FAILURES) as error:
            raise DataError(f"{path}: {error}; {what}") from None
        reader = pa.ipc.open_file(pa.py_buffer(memory))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        return cls(path, [memory], batches, schema)

    @classmethod
    def of_saved(cls, directory: Path, files: Sequence[Path]) -> ArrowRows:
        """The rows of the Arrow files of a saved dataset; see tables.open_table."""
        maps, batches, schema = list[mmap.mmap](), list[pa.RecordBatch](), None
        for path in files:
            try:
                with path.open("rb") as file:
                    maps.append(_map(file))
                reader = pa.ipc.open_stream(pa.py_buffer(maps[-1]))
                if schema is not None and reader.schema.remove_metadata() != schema:
                    raise ValueError(f"other columns than {files[0].name}")
                schema = reader.schema.remove_metadata()
                batches += list(reader)
            except (OSError, *_FAILURES) as error:
                raise DataError(f"{path}: {error}; save the dataset again (save_to_disk)") from None
        return cls(directory, maps, batches, schema or pa.schema([]))

    def __len__(self) -> int:
        """Rows of the file."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def place(self, row: int) -> str:
        """`file:row`, counted from 1"""
        return f"{self._path}:{row + 1}"

    def number(self, row: int) -> int:
        """The row, from 1."""
        return row + 1

    def record(self, row: int) -> Mapping[str, Any]:
        """A row without the nulls that Arrow filled in; see Table."""
        self._reads += 1
        if self._reads % _BLOCK == 0:
            self._forget()
        number = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[number]
        one = batch.slice(row - (int(self._ends[number]) - len(batch)), 1)
        try:
            one.validate(full=True)  # a damaged file of offsets would be read beyond its end
            return without_nulls({name: _value(one.column(name)[0]) for name in one.schema.names})
        except _FAILURES as error:
            raise DataError(f"{self.place(row)}: {error}; check that the file is whole") from None

    def digests(self, rows: range) -> npt.NDArray[np.uint64]:
        """A digest of every block of 1024 rows, whatever batches they were written in; see Table."""
        table = pa.Table.from_batches(self._batches, self._batches[0].schema) if self._batches else None
        if table is None or not len(rows):
            return np.zeros(0, np.uint64)
        schema = str(self._schema).encode(errors="surrogatepass")
        found = [_digest(schema, table.slice(row, min(_BLOCK, rows.stop - row))) for row in rows[::_BLOCK]]
        self._forget()
        return np.frombuffer(b"".join(found), np.uint64)

    def suspects(self, rows: range, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """Rows where a key is null or absent, as far as the columns have it; see Table."""
        wrong = np.zeros(len(self), np.bool_)
        for key in keys:
            wrong |= np.concatenate([np.zeros(0, np.bool_), *(_nulls(batch, key) for batch in self._batches)])
        self._forget()
        return np.flatnonzero(wrong[rows.start : rows.stop]) + rows.start

    def _forget(self) -> None:
        """Give back the memory of what was read: the file still has it."""
        pa.default_memory_pool().release_unused()
        for memory in self._maps:
            memory.madvise(mmap.MADV_DONTNEED)


def _value(scalar: pa.Scalar) -> Any:
    """Its value in Python; a time that Python cannot hold, such as a nanosecond, is a text."""
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        if not pa.types.is_temporal(scalar.type):
            raise
        return str(scalar.cast(pa.string()))


def _nulls(batch: pa.RecordBatch, key: str) -> npt.NDArray[np.bool_]:
    """[rows] where there is nothing under `key`, or within objects under `a.b.c`."""
    if key in batch.schema.names:
        return batch.column(key).is_null().to_numpy(zero_copy_only=False)
    name, *inner = key.split(".")
    if name not in batch.schema.names:
        return np.ones(len(batch), np.bool_)
    column = batch.column(name)
    wrong = column.is_null().to_numpy(zero_copy_only=False)
    for part in inner:
        if not isinstance(column, pa.StructArray) or column.type.get_field_index(part) < 0:
            return np.ones(len(batch), np.bool_)
        column = column.field(part)
        wrong |= column.is_null().to_numpy(zero_copy_only=False)
    return wrong


def _digest(schema: bytes, block: pa.Table) -> bytes:
    digest = blake2b(schema, digest_size=DIGEST_BYTES)
    if b"dictionary" in schema:  # whose values are not in the batch
        digest.update(repr(block.to_pylist()).encode(errors="surrogatepass"))
    else:  # `take` makes buffers that hold these rows and nothing of their neighbours
        for batch in block.take(np.arange(len(block))).combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.digest()


def _flushed(path: Path, file: IO[bytes]) -> mmap.mmap:
    try:
        file.flush()
        return _map(file)
    except OSError as error:
        raise no_room(path, error) from None


def _map(file: IO[bytes]) -> mmap.mmap:
    """Its bytes; unmapped when the last batch is gone."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class _Sink:
    """A file that pyarrow writes to; a disk without room is an error of the disk, not of what was read."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            raise no_room(self._path, error) from None

    def flush(self) -> None:
        """Nothing: `_flushed` does, where the disk is the one to blame."""

    closed = False


def without_nulls(value: Any) -> Any:
    """A value without the keys whose value is null, in objects within it too.

    All rows of a column have the same keys in Arrow, which fills up with nulls what a row lacks: without this
    a template would be shown arguments that nobody gave.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
