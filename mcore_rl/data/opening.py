"""Any file or directory of rows as a table.

A file stays open. What cannot be read from the middle, gzip and parquet, is unpacked once into a temporary
file without a name (in TMPDIR), of which nothing is left when the process ends, however it ends.
"""

from __future__ import annotations

import gzip
import shutil
import zlib
from pathlib import Path
from typing import IO

from mcore_rl.data.locate import arrow_files
from mcore_rl.data.tables import JsonLines, Table, no_room, temporary
from mcore_rl.errors import DataError

_CHUNK = 1 << 23
"""bytes that are unpacked at a time"""


def open_table(path: Path) -> Table:
    """The rows of a file, or of a directory that `datasets` saved.

    Raises:
        DataError: it is not there, or not what its name says.
        StorageError: there is no room for what must be unpacked.
    """
    # Imported here: pyarrow adds a quarter of a second to the start of every rank, and few need it
    if path.is_dir():
        from mcore_rl.data.arrow import ArrowRows

        return ArrowRows.of_saved(path, arrow_files(path))
    if path.name.endswith(".parquet"):
        from mcore_rl.data.arrow import ArrowRows

        return ArrowRows.of_parquet(path)
    try:
        with path.open("rb") as file:
            if not path.name.endswith(".gz"):
                return JsonLines(path, file)
            with _unpacked(path, file) as unpacked:
                return JsonLines(path, unpacked)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the path") from None


def _unpacked(path: Path, packed: IO[bytes]) -> IO[bytes]:
    unpacked = temporary(path)
    with packed, gzip.GzipFile(fileobj=packed) as source:
        try:
            shutil.copyfileobj(source, unpacked, _CHUNK)
            unpacked.flush()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: {error}; check that it is a whole gzip file") from None
        except OSError as error:
            raise no_room(path, error) from None
    return unpacked
