"""Named arrays and one JSON document in a file that numpy's `load` reads too, and that is never trusted.

The file is an .npz without compression, so that nothing in it can be larger than the file. No object is
unpickled from it, and the JSON is parsed strictly.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_rl import strict_json
from mcore_rl.errors import DataError
from mcore_rl.terminal import short

Arrays = dict[str, npt.NDArray[Any]]
_DOCUMENT = "document"
_SUFFIX = ".npy"


def archive_bytes(document: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The content of the file."""
    text = json.dumps(document).encode()
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{_DOCUMENT: np.frombuffer(text, np.uint8), **arrays})
    return buffer.getvalue()


def read_archive(path: Path, kind: str) -> tuple[dict[str, Any], Arrays]:
    """The document and the arrays of a file, which are read-only; the document's `kind` is this one.

    Raises:
        DataError: there is no such file, or something else wrote it, or it is damaged.
    """
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        arrays = _read(path)
        document = strict_json.parse(arrays.pop(_DOCUMENT, np.zeros(0, np.uint8)).tobytes())
        if not isinstance(document, dict) or document.get("kind") != kind:
            raise ValueError(f"its document does not say that it is one of {kind}")
    except (OSError, ValueError, RuntimeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise malformed(path, error) from error
    return document, arrays


def malformed(path: Path, what: object) -> DataError:
    """The error of a file that is no dump, or no longer one."""
    return DataError(
        f"{path}: not what mcore_rl wrote, or damaged ({short(what)}); take it from where it was written, or "
        "move it away"
    )


def _read(path: Path) -> Arrays:
    """Raises ValueError and what zipfile raises; a CRC guards every array."""
    with zipfile.ZipFile(path) as zipped:
        entries = zipped.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its parts are larger than the file")
        return {entry.filename.removesuffix(_SUFFIX): _array(zipped.read(entry)) for entry in entries}


def _array(data: bytes) -> npt.NDArray[Any]:
    """An array over the bytes of a .npy file, whose header says no more than they hold."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array of another version of numpy's format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype.hasobject or dtype.itemsize == 0 or any(size < 0 for size in shape):
        raise ValueError("an array that is none of numbers in C order")
    if int(np.prod(shape, dtype=object)) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"an array of shape {list(shape)} in {len(data)} bytes")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)
