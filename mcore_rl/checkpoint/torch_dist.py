"""Megatron's torch_dist format: one `.distcp` file per rank and a `.metadata` that says what lies where."""

from __future__ import annotations

import io
import json
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mcore_rl.checkpoint.image import PieceEntry
from mcore_rl.checkpoint.pieces import Piece
from mcore_rl.errors import CheckpointError, ConfigError, DamagedCheckpointError
from mcore_rl.model.hf.unpickle import read_metadata
from mcore_rl.terminal import quoted

METADATA = ".metadata"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

_Archive = tuple[str, int, int]
"""(file, first byte, bytes) of one saved block"""


def data_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"__{rank}_0.distcp"


def side_files(entries: Sequence[Sequence[PieceEntry]]) -> dict[str, bytes]:
    """The files beside the data, given each rank's entries: what Megatron looks for when it loads.

    Raises:
        CheckpointError: the ranks' blocks do not cover every global tensor exactly.
    """
    common = io.BytesIO()
    torch.save({}, common)  # Megatron's replicated state; ours is in the manifest
    return {
        METADATA: pickle.dumps(_metadata(entries)),
        "metadata.json": json.dumps(_BACKEND).encode(),
        "common.pt": common.getvalue(),
    }


def _metadata(entries: Sequence[Sequence[PieceEntry]]) -> Metadata:
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    covered: dict[str, int] = defaultdict(int)
    for rank, own in enumerate(entries):
        for entry in own:
            size, extent = torch.Size(entry.shape), torch.Size(entry.extent)
            offset = torch.Size(entry.offset)
            fresh = TensorStorageMetadata(TensorProperties(dtype=entry.dtype), size, [])
            tensors.setdefault(entry.key, fresh).chunks.append(ChunkStorageMetadata(offset, extent))
            place = _StorageInfo(data_file(rank), entry.start, entry.length)
            places[MetadataIndex(entry.key, offset)] = place
            covered[entry.key] += extent.numel()
    wrong = [key for key, tensor in tensors.items() if covered[key] != tensor.size.numel()]
    if wrong or len(places) != sum(map(len, entries)):
        raise CheckpointError(
            f"the ranks hold too much or too little of {wrong[:5]}; a bug in checkpoint/pieces.py"
        )
    return Metadata(state_dict_metadata=dict(tensors), storage_data=places)


class _Read(NamedTuple):
    """What one saved block gives to one piece."""

    source: tuple[slice, ...]
    target: Tensor


def load_pieces(directory: Path, pieces: Iterable[Piece], files: Iterable[str]) -> None:
    """Fill the pieces from a torch_dist directory, whatever layout wrote it. Not collective.

    Args:
        files: names in the directory that may be read.

    Raises:
        ConfigError: the checkpoint is of another model: a tensor is missing, or has another shape or type.
        DamagedCheckpointError: the directory does not hold what its metadata says.
    """
    metadata = read_metadata(directory / METADATA)
    allowed = frozenset(files)
    reads: dict[_Archive, list[_Read]] = defaultdict(list)
    for piece in pieces:
        saved = _saved_tensor(directory, metadata, piece)
        if piece.padded:
            piece.data.zero_()  # rows that only this layout's padding has
        found = 0
        for chunk in saved.chunks:
            read = _overlap(piece, tuple(chunk.offsets), tuple(chunk.sizes))
            if read is not None:
                info = metadata.storage_data[MetadataIndex(piece.key, chunk.offsets)]
                reads[_archive(directory, info, allowed)].append(read)
                found += read.target.numel()
        if found != piece.data.numel() and not piece.padded:
            raise DamagedCheckpointError(f"{directory / METADATA}: {piece.key} has gaps")
    _copy(directory, reads)


def _saved_tensor(directory: Path, metadata: Metadata, piece: Piece) -> TensorStorageMetadata:
    saved = metadata.state_dict_metadata.get(piece.key)
    if not isinstance(saved, TensorStorageMetadata):
        raise ConfigError(
            f"{directory} has no tensor {piece.key}: it is of another model or algorithm; resume with the "
            "configuration of the saved run"
        )
    own, its = piece.shape, tuple(saved.size)
    if piece.padded:
        own, its = own[1:], its[1:]
    if own != its or saved.properties.dtype != piece.data.dtype:
        raise ConfigError(
            f"{directory}: {piece.key} is {saved.properties.dtype} {tuple(saved.size)}, this run's is "
            f"{piece.data.dtype} {piece.shape}; resume with the model and precision of the saved run"
        )
    return saved


def _overlap(piece: Piece, offset: tuple[int, ...], extent: tuple[int, ...]) -> _Read | None:
    source, target = [], []
    for mine, size, its, other in zip(piece.offset, piece.data.shape, offset, extent, strict=True):
        low, high = max(mine, its), min(mine + size, its + other)
        if low >= high:
            return None
        source.append(slice(low - its, high - its))
        target.append(slice(low - mine, high - mine))
    return _Read(tuple(source), piece.data[tuple(target)])


def _archive(directory: Path, info: Any, allowed: frozenset[str]) -> _Archive:
    if info.relative_path not in allowed or getattr(info, "transform_descriptors", None):
        raise DamagedCheckpointError(
            f"{directory / METADATA}: points to {quoted(info.relative_path)}, which the manifest does not "
            "list"
        )
    return info.relative_path, info.offset, info.length


def _copy(directory: Path, reads: Mapping[_Archive, Sequence[_Read]]) -> None:
    by_file: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, start, length in sorted(reads):
        by_file[name].append((start, length))
    for name, archives in by_file.items():
        with (directory / name).open("rb") as file:
            for start, length in archives:
                file.seek(start)
                saved = _load(directory / name, file.read(length))
                for source, target in reads[name, start, length]:
                    target.copy_(saved[source])


def _load(path: Path, archive: bytes) -> Tensor:
    try:
        loaded = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what it refuses or cannot parse
        raise DamagedCheckpointError(f"{path}: refused: {error}; nothing of it was run") from None
    if not isinstance(loaded, Tensor):
        raise DamagedCheckpointError(f"{path}: holds a {type(loaded).__name__} where a tensor belongs")
    return loaded
