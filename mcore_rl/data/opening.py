"""Any file or directory of rows as a table.

A file stays open. What cannot be read from the middle, gzip and parquet, is unpacked once into a temporary
file without a name (in TMPDIR), of which nothing is left when the process ends, however it ends.
"""

from __future__ import annotations

import gzip
import shutil
import stat
import zlib
from pathlib import Path
from typing import IO

from mcore_rl.data.locate import arrow_files
from mcore_rl.data.tables import JsonLines, Table, no_room, temporary
from mcore_rl.errors import DataError

_CHUNK = 1 << 23
"""bytes that are unpacked at a time"""
_OTHERS = {
    b"\x1f\x8b": "a gzip file; call it .jsonl.gz",
    b"PAR1": "a parquet file; call it .parquet",
    b"ARROW1": "an Arrow file; name the directory that datasets saved, or convert it to parquet",
    b"\xff\xff\xff\xff": "an Arrow stream; name the directory that datasets saved",
    b"PK\x03\x04": "a zip file; unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it, or pack it by gzip",
    b"\xfd7zXZ": "an xz file; unpack it, or pack it by gzip",
    b"BZh": "a bzip2 file; unpack it, or pack it by gzip",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file (git lfs pull)",
}
"""how files begin that are no jsonl -> what they are, and the remedy"""


_LONGEST = max(map(len, _OTHERS))


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
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a plain file, which is read from its middle; write the rows to one")
        with path.open("rb") as file:
            begins = file.read(_LONGEST)
            file.seek(0)
            for magic, what in () if path.name.endswith(".gz") else _OTHERS.items():
                if begins.startswith(magic):
                    raise DataError(f"{path}: {what}")
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
