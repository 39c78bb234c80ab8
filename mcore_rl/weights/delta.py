"""What changed between two versions of a weight file, unit by unit: bit for bit the same file again.

An optimizer step moves most weights by less than bf16 can tell, so between two versions only few of them
change. Units (the items of the weights) that did are kept as values and two-byte places in blocks of 2^16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save
from torch import Tensor

from mcore_rl.directories import files_in
from mcore_rl.errors import WeightSyncError
from mcore_rl.model.hf.files import Form, safetensors_layout, tensor_bytes

SUFFIX = ".delta"
"""ending of a file with what changed in the one without"""
SUM_SUFFIX = ".sha256"
"""ending of the checksum beside a file that is whole"""
_BLOCK = 1 << 16
_BLOCKS_AT_ONCE = 1 << 10
"""compared in one go: bounds the memory that a comparison takes"""
_UNITS: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Units = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Delta:
    """Units of a file that differ from an older one of the same size."""

    counts: npt.NDArray[np.uint32]
    """[blocks] units that changed in every block of 2^16"""
    offsets: npt.NDArray[np.uint16]
    """[k] their places in their blocks, block after block"""
    values: Units
    """[k] what they are now"""

    @property
    def nbytes(self) -> int:
        """2 for the place of a unit besides its own, and 4 for every block."""
        return self.counts.nbytes + self.offsets.nbytes + self.values.nbytes


def difference(old: Units, new: Units) -> Delta:
    """What makes `new` of `old`: arrays [n] of one unsigned type and size."""
    counts, offsets, values = [], [], []
    for start in range(0, max(1, len(new)), _BLOCK * _BLOCKS_AT_ONCE):
        part = new[start : start + _BLOCK * _BLOCKS_AT_ONCE]
        places = np.flatnonzero(old[start : start + len(part)] != part)
        blocks = -(-len(part) // _BLOCK)
        counts.append(np.bincount(places // _BLOCK, minlength=blocks).astype(np.uint32))
        offsets.append((places % _BLOCK).astype(np.uint16))
        values.append(part[places])
    return Delta(np.concatenate(counts), np.concatenate(offsets), np.concatenate(values))


def patch(file: Units, delta: Delta) -> None:
    """Make the new version of the old one in place: `file` [n], such as a memory map.

    Raises:
        WeightSyncError: the delta is not one of a file of this size.
    """
    ends = np.cumsum(delta.counts, dtype=np.int64)
    blocks = -(-len(file) // _BLOCK)
    if len(delta.counts) != blocks or (int(ends[-1]) if blocks else 0) != len(delta.offsets):
        raise WeightSyncError(f"a delta of {len(delta.counts)} blocks, for a file of {blocks}")
    for block in np.flatnonzero(delta.counts):
        stop = int(ends[block])
        start = stop - int(delta.counts[block])
        places = delta.offsets[start:stop].astype(np.int64)
        file[int(block) * _BLOCK :][places] = delta.values[start:stop]


class Writer:
    """One rank's weight file of each version: whole at first, then what changed since the one before.

    It keeps the newest in host memory, as many bytes as this rank writes.
    """

    def __init__(self) -> None:
        self._before: dict[str, Units] = {}

    def forget(self) -> None:
        """Have the next version written whole."""
        self._before = {}

    @contextmanager
    def open(self, path: Path, forms: Mapping[str, Form]) -> Iterator[Image]:
        """Take the tensors of `path`; it is written when the block has ended well.

        Written is the safetensors file, with its checksum beside it, or `path` + SUFFIX where that is
        smaller.
        """
        image = Image(forms)
        before, self._before = self._before.get(path.name), {}
        yield image
        content = image.units()
        sha256 = hashlib.sha256(content.data).hexdigest()
        if not _write_difference(path, before, content, sha256):
            path.write_bytes(content.data)
            path.with_name(path.name + SUM_SUFFIX).write_text(sha256)
        self._before = {path.name: content}


class Image:
    """The bytes of a safetensors file in host memory, filled tensor by tensor."""

    def __init__(self, forms: Mapping[str, Form]) -> None:
        header, self._begins, length = safetensors_layout(forms)
        self._unit = min((dtype.itemsize for _, dtype in forms.values()), default=1)
        self._waiting = set(forms)
        self._content = np.empty(length, np.uint8)
        self._content[: len(header)] = np.frombuffer(header, np.uint8)

    def write(self, name: str, tensor: Tensor) -> None:
        """One tensor, on the CPU."""
        self._waiting.remove(name)
        begin = self._begins[name]
        self._content[begin : begin + tensor.nbytes] = np.frombuffer(tensor_bytes(tensor), np.uint8)

    def units(self) -> Units:
        """All bytes, as items of the narrowest type. Raises ValueError: a tensor has not been written."""
        if self._waiting:
            raise ValueError(f"not written: {sorted(self._waiting)}")
        return self._content.view(_UNITS[self._unit])


def _write_difference(path: Path, before: Units | None, content: Units, sha256: str) -> bool:
    """Write what changed, if that takes fewer bytes; whether it did."""
    if before is None or before.dtype != content.dtype or before.shape != content.shape:
        return False
    delta = difference(before, content)
    if delta.nbytes >= content.nbytes:
        return False
    arrays = {"counts": delta.counts, "offsets": delta.offsets, "values": delta.values}
    path.with_name(path.name + SUFFIX).write_bytes(save(arrays, metadata={"sha256": sha256}))
    return True


def apply(delta: Path, file: Path) -> None:
    """Patch `file`, a copy of the version before, by the file `delta` that a Writer wrote.

    Raises:
        WeightSyncError: the result is not the file that was written; `file` is of no use then.
    """
    try:
        arrays = load_file(delta)
        read = Delta(arrays["counts"], arrays["offsets"], arrays["values"])
        with safe_open(delta, framework="numpy") as header:
            expected = header.metadata()["sha256"]
        if file.stat().st_size % read.values.dtype.itemsize:
            raise WeightSyncError(f"{file}: not a file of whole units")
        mapped = np.memmap(file, dtype=read.values.dtype, mode="r+")
        patch(mapped, read)
        mapped.flush()
    except (OSError, KeyError, TypeError, ValueError, IndexError, SafetensorError) as error:
        raise WeightSyncError(f"{delta}: cannot be applied ({error})") from error
    check(file, expected)


def check(file: Path, sha256: str) -> None:
    """Raises WeightSyncError where `file` has another checksum."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != sha256:
        raise WeightSyncError(
            f"{file}: not the file that was written (SHA-256 {found[:12]}, not {sha256[:12]})"
        )


def files_of(version: Path) -> Iterator[str]:
    """The names of the files of a version's directory, whole or changed, without the checksums."""
    return (name for name in files_in(version) if not name.endswith(SUM_SUFFIX))
