"""Hugging Face -> torch_dist: each parameter is read, arranged and written before the next one is read."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from mcore_rl.convert.output import ConversionProgress
from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.architecture import read_architecture, read_json_object
from mcore_rl.model.hf.files import check_side_files, hf_reader, hf_tensors, left_out, side_files
from mcore_rl.model.hf.parameters import HF_DTYPES, ParameterEntry, ParameterMap
from mcore_rl.model.hf.torch_dist import Place, place
from mcore_rl.terminal import printable
from mcore_rl.weight_files import unread

_MEGATRON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

_MOST_FILES = 1 << 16


@dataclass(frozen=True)
class LazyPlanner:
    """The part of a save planner that FileSystemWriter asks: a parameter is made when its turn comes."""

    entries: dict[MetadataIndex, tuple[ParameterEntry, Place]]
    mapping: ParameterMap
    read: Callable[[str], Tensor]
    progress: ConversionProgress
    last: list[Tensor] = field(default_factory=list)
    """the parameter handed out before, at most one"""

    def resolve_data(self, item: WriteItem) -> Tensor:
        """[size of the box] the parameter of one rank alone."""
        for written in self.last:
            # It is in the file; torch.save leaves it in a reference cycle, for the garbage collector.
            if written.untyped_storage().resizable():
                written.untyped_storage().resize_(0)
        entry, where = self.entries[item.index]
        parameter = self.mapping.to_shard(entry, [self.read(name) for name in entry.hf], 0, 1)
        self.progress.add(parameter.nbytes)
        # A tensor that owns its storage: torch.save writes all of a storage, not the view of it.
        whole = parameter.untyped_storage().nbytes() == parameter.nbytes
        parameter = parameter if whole else parameter.clone()
        self.last[:] = [parameter]
        return parameter.view(where.size)


class _AnonymousWriter(FileSystemWriter):
    """Does not say where on this machine it wrote."""

    def storage_meta(self) -> None:
        return None


def write_torch_dist(
    source: Path, directory: Path, *, tensor: int = 1, pipeline: int = 1
) -> ConversionProgress:
    """Write the HF model `source` into the empty `directory`, in `tensor * pipeline` files.

    Weights keep their type. Peak memory is a few times the largest parameter, whatever the model's size.

    Raises:
        ConfigError: the source is not a supported model, or is not complete, or a file beside it is damaged.
    """
    if min(tensor, pipeline) < 1:
        raise ConfigError(f"--tp {tensor} --pp {pipeline}: the numbers of writers must be positive")
    if tensor * pipeline > _MOST_FILES:
        raise ConfigError(f"--tp {tensor} --pp {pipeline}: at most {_MOST_FILES} files in all")
    arch = read_architecture(source)
    check_side_files(source)
    mapping = ParameterMap(arch, arch.vocab)
    read = hf_reader(source, mapping)
    for left in (unread(source), left_out(source, arch)):
        if left:
            print(printable(f"warning: {left}"), file=sys.stderr, flush=True)
    types = {name: HF_DTYPES[tensor.type] for name, tensor in hf_tensors(source, mapping).items()}
    entries = mapping.entries()
    placed = {_index(where): (entry, where) for entry in entries for where in [place(entry, mapping)]}
    plans = [
        SavePlan([_item(where, types[entry.hf[0]]) for entry, where in (placed[index] for index in part)])
        for part in _distribute(placed, arch.layers, tensor, pipeline)
    ]
    planner = LazyPlanner(placed, mapping, read, ConversionProgress(len(entries)))
    writer = _AnonymousWriter(directory, sync_files=True)
    plans, metadata = create_default_global_save_plan(plans)
    plans = writer.prepare_global_plan(plans)
    try:
        results = [writer.write_data(plan, cast(Any, planner)).wait() for plan in plans]
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch.save hides a full disk behind an error of its own
            raise error.__context__ from error
        raise
    writer.finish(metadata, results)
    _write_side_files(source, directory)
    return planner.progress


def _index(where: Place) -> MetadataIndex:
    return MetadataIndex(where.key, torch.Size(where.offset))


def _item(where: Place, dtype: torch.dtype) -> WriteItem:
    box = ChunkStorageMetadata(torch.Size(where.offset), torch.Size(where.size))
    data = TensorWriteData(box, TensorProperties(dtype=dtype), torch.Size(where.shape))
    return WriteItem(_index(where), WriteItemType.SHARD, tensor_data=data)


def _distribute(
    placed: dict[MetadataIndex, tuple[ParameterEntry, Place]], layers: int, tensor: int, pipeline: int
) -> list[list[MetadataIndex]]:
    """Per writer its parameters: a stage's layers together, spread over the stage's writers by size."""
    parts: list[list[MetadataIndex]] = [[] for _ in range(tensor * pipeline)]
    load = [0] * len(parts)
    for index, (entry, where) in placed.items():
        first = entry.megatron.startswith("embedding.")
        layer = entry.layer if entry.layer is not None else (0 if first else layers - 1)
        stage = layer * pipeline // layers
        mine = min(range(stage * tensor, (stage + 1) * tensor), key=load.__getitem__)
        parts[mine].append(index)
        load[mine] += torch.Size(where.size).numel()
    return [part for part in parts if part]


def _write_side_files(source: Path, directory: Path) -> None:
    """What Megatron's loader looks for, and what a model directory holds beside weights."""
    (directory / "metadata.json").write_text(json.dumps(_MEGATRON))
    common = io.BytesIO()
    torch.save({}, common)
    (directory / "common.pt").write_bytes(common.getvalue())
    for name, path in side_files(source).items():
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, directory / name)
    fields = read_json_object(directory / "config.json")
    if fields.pop("quantization_config", None) is not None:  # the weights beside it are multiplied out
        (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
