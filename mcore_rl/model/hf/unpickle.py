"""Reads torch_dist's `.metadata`, which is a pickle, without letting it name anything but plain records.

A pickle runs what it names. This reader knows the records of torch.distributed.checkpoint, torch's sizes and
types, and nothing else: any other name is refused before it is looked up, so nothing the file chooses runs.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from mcore_rl.errors import DamagedCheckpointError

_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    # Megatron keeps every rank's plan in the metadata that it writes itself.
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),  # where it was written
    "collections": ("OrderedDict",),
}
ALLOWED = {(module, name) for module, names in _RECORDS.items() for name in names} | {
    ("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
"""(module, name) of everything that a `.metadata` may name"""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The metadata of a torch_dist checkpoint.

    Raises:
        DamagedCheckpointError: the file is no such metadata, or names something that metadata does not need.
    """
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: {error.strerror}") from None
    except Exception as error:  # whatever a damaged pickle raises
        raise DamagedCheckpointError(f"{path}: refused: {error}; nothing of it was run") from None
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise DamagedCheckpointError(f"{path}: not the metadata of a torch_dist checkpoint")
    return metadata
