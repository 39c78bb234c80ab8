"""The staging buffer: one host buffer that is, byte for byte, the `.distcp` file of this rank.

A `.distcp` file is a row of `torch.save` archives, one per tensor. Their bytes but the tensors' depend on
shapes only, so they are laid out once; from then on a save is one copy of each tensor into its place, and
writing is one pass over the buffer that releases the interpreter: training goes on meanwhile.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import skip_data

from mcore_rl.checkpoint.pieces import Piece

_ALIGN = 64
"""bytes; tensors lie aligned in their archives too"""
_CHUNK = 1 << 24
"""bytes of one write"""


@dataclass(frozen=True)
class PieceEntry:
    """Where a piece lies in the file."""

    key: str
    shape: tuple[int, ...]
    """shape of the global tensor"""
    dtype: torch.dtype
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    start: int
    """first byte of its archive"""
    length: int
    """bytes of its archive"""


@dataclass(frozen=True)
class Written:
    """A file that is on disk."""

    name: str
    size: int
    """bytes"""
    sha256: str


class FileImage:
    """A rank's file in host memory, filled anew at every save."""

    def __init__(self) -> None:
        """Memory is taken by the first `fill`."""
        self.entries: tuple[PieceEntry, ...] = ()
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._places: list[Tensor] = []

    @property
    def size(self) -> int:
        """Bytes."""
        return self._buffer.numel()

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Copy the pieces' current values into the image, laid out anew only when they changed shape."""
        if [_form(piece) for piece in pieces] != [
            (entry.key, entry.shape, entry.dtype, entry.offset, entry.extent) for entry in self.entries
        ]:
            self._lay_out(pieces)
        for place, piece in zip(self._places, pieces, strict=True):
            place.copy_(piece.data, non_blocking=True)
        if self._buffer.is_pinned():
            torch.cuda.current_stream().synchronize()

    def _lay_out(self, pieces: Sequence[Piece]) -> None:
        archives, entries, end = [_archive(piece.data) for piece in pieces], [], 0
        for piece, (_, size, _) in zip(pieces, archives, strict=True):
            entries.append(PieceEntry(*_form(piece), end, size))
            end += -(-size // _ALIGN) * _ALIGN
        self._buffer = torch.zeros(end, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._places = []
        for entry, piece, (parts, _, data) in zip(entries, pieces, archives, strict=True):
            for at, part in parts:
                self._buffer[entry.start + at :][: len(part)] = torch.frombuffer(part, dtype=torch.uint8)
            place = self._buffer[entry.start + data :][: piece.data.nbytes]
            self._places.append(place.view(piece.data.dtype).view(piece.data.shape))
        self.entries = tuple(entries)

    def write(self, path: Path) -> Written:
        """Write the image to the new file `path`, durably."""
        return write_file(path, self._buffer.numpy().data)


def write_file(path: Path, content: bytes | memoryview) -> Written:
    """Write a new file durably, with its checksum."""
    digest, view = hashlib.sha256(), memoryview(content)
    with path.open("xb", buffering=0) as file:
        for at in range(0, len(view), _CHUNK):
            chunk = view[at : at + _CHUNK]
            digest.update(chunk)
            while len(chunk):  # a raw write may take less than it is given
                chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return Written(path.name, len(view), digest.hexdigest())


def _form(piece: Piece) -> tuple[str, tuple[int, ...], torch.dtype, tuple[int, ...], tuple[int, ...]]:
    return piece.key, piece.shape, piece.data.dtype, piece.offset, tuple(piece.data.shape)


def _archive(tensor: Tensor) -> tuple[list[tuple[int, bytearray]], int, int]:
    """What `torch.save` writes for a tensor but its data: ([(at, bytes)], size, where the data belongs)."""
    whole = io.BytesIO()
    with skip_data():
        torch.save(torch.empty(tensor.shape, dtype=tensor.dtype), whole)
    content = whole.getbuffer()
    record = next(r for r in zipfile.ZipFile(whole).infolist() if r.filename.endswith("/data/0"))
    name, extra = struct.unpack_from("<HH", content, record.header_offset + 26)  # of the local file header
    start = record.header_offset + 30 + name + extra
    end = start + record.file_size
    return [(0, bytearray(content[:start])), (end, bytearray(content[end:]))], len(content), start
