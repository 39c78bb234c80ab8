"""A model in torch_dist form, as Megatron and the training checkpoints write it: names, places, lazy reading.

The form knows no layout: a parameter is one global tensor, that of one rank alone, stored as any boxes. Keys
are those of Megatron's `sharded_state_dict` with a key per layer; a layer's experts share one key, along a
first axis.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mcore_rl.errors import CheckpointError, ConfigError
from mcore_rl.model.hf.adapters import PLACE
from mcore_rl.model.hf.parameters import HF_DTYPES, ParameterEntry, ParameterMap
from mcore_rl.model.hf.unpickle import read_metadata
from mcore_rl.terminal import quoted, short

METADATA = ".metadata"
VALUE_HEAD = "value_head.weight"
CRITIC = "critic."
"""prefix of the keys of the critic, in the checkpoint of a run that has one"""
OTHER_STATE = ("optimizer.", "common_state", "fp8.", CRITIC)
"""prefixes of keys that belong to a training checkpoint's other parts"""


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: the box of a global tensor."""

    key: str
    shape: tuple[int, ...]
    """shape of the global tensor"""
    offset: tuple[int, ...]
    size: tuple[int, ...]


def place(entry: ParameterEntry, mapping: ParameterMap) -> Place:
    """Where a parameter of the whole model (one rank's, without padding of the vocabulary) lies."""
    shape = mapping.shape(entry.rule)
    key = entry.megatron
    if PLACE in key:  # an adapter's has a key of its own, also that of an expert
        return Place(key, shape, (0,) * len(shape), shape)
    if entry.is_expert and mapping.arch.experts is not None:
        head, _, tail = key.partition(".local_experts.")
        number, _, rest = tail.partition(".")
        count = mapping.arch.experts.count
        zeros = (0,) * len(shape)
        return Place(f"{head}.experts.{rest}", (count, *shape), (int(number), *zeros), (1, *shape))
    if mapping.arch.latent is None:
        key = key.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    else:
        key = re.sub(r"\b(q|kv)_layernorm\.", r"linear_\1_up_proj.layer_norm_", key)
    if entry.layer is not None and not mapping.arch.is_sparse(entry.layer):
        key = key.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    return Place(key, shape, (0,) * len(shape), shape)


def holds_torch_dist(directory: Path) -> bool:
    """True for a directory in this form; ConfigError where it is in that of Hugging Face too."""
    metadata = Path(directory) / METADATA
    safetensors = next(Path(directory).glob("*.safetensors"), None)
    if metadata.is_file() and safetensors is not None:
        raise ConfigError(
            f"{metadata} and {safetensors}: two models in one directory, of which transformers reads the "
            "second; remove one of them"
        )
    return metadata.is_file()


def torch_dist_reader(directory: Path, mapping: ParameterMap, prefix: str = "") -> Callable[[str], Tensor]:
    """A function that reads an HF tensor by name from the parameters in `directory`, written at any layout.

    Args:
        prefix: CRITIC for those of the critic.

    Raises:
        ConfigError: lists every parameter that is missing, unexpected, or of a wrong shape or type.
        CheckpointError: the directory is damaged, or asks for anything but reading its own files.
    """
    directory = Path(directory)
    metadata = read_metadata(directory / METADATA)
    _check_files(directory, metadata)
    problems = _problems(metadata, mapping, prefix)
    if problems:
        raise ConfigError(f"{directory}: parameters do not fit config.json: " + "; ".join(problems))
    tensors = cast("dict[str, TensorStorageMetadata]", metadata.state_dict_metadata)
    by_hf = {name: entry for entry in mapping.entries() for name in entry.hf}
    storage = FileSystemReader(directory)
    storage.set_up_storage_reader(metadata, is_coordinator=False)

    @lru_cache(maxsize=1)  # an HF model is read tensor by tensor: query, key, value are one parameter
    def split(megatron: str) -> dict[str, Tensor]:
        entry = mapping.entry(megatron)
        where = place(entry, mapping)
        key = prefix + where.key
        stored = tensors[key]
        rows = stored.size[0] if entry.rule.merge == "vocab" else where.size[0]
        box = ChunkStorageMetadata(torch.Size(where.offset), torch.Size((rows, *where.size[1:])))
        out = torch.empty(box.sizes, dtype=stored.properties.dtype)
        items = create_read_items_for_chunk_list(key, stored, [box])
        if sum(torch.Size(item.lengths).numel() for item in items) != out.numel():
            raise CheckpointError(f"{directory}: {key} is stored with gaps or overlaps")
        try:
            storage.read_data(LoadPlan(items), cast(Any, _Target(out, where.offset))).wait()
        except (OSError, EOFError, RuntimeError, AssertionError, KeyError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{directory}: {key} cannot be read: {error}") from error
        views = mapping.parts(entry, out[0] if len(where.size) > len(mapping.shape(entry.rule)) else out, 1)
        pieces = [
            view.reshape(-1, *shape[1:])[: shape[0]]  # less the padding of a vocabulary
            for shape, view in zip(mapping.piece_shapes(entry.rule), views, strict=True)
        ]
        pieces = [torch.cat(pieces)] if entry.rule.joined else pieces
        return dict(zip(entry.hf, pieces, strict=True))

    return lambda name: split(by_hf[name].megatron)[name]


def holds_classifier(directory: Path, prefix: str = "") -> bool:
    """Whether the model in it, with CRITIC the critic, ends in a value head, as a reward model does."""
    return prefix + VALUE_HEAD in read_metadata(Path(directory) / METADATA).state_dict_metadata


def torch_dist_types(directory: Path, mapping: ParameterMap, prefix: str = "") -> dict[str, torch.dtype]:
    """HF tensor name -> the type that it has in `directory`, which `torch_dist_reader` has accepted."""
    stored = read_metadata(Path(directory) / METADATA).state_dict_metadata
    tensors = cast("dict[str, TensorStorageMetadata]", stored)
    return {
        name: tensors[prefix + place(entry, mapping).key].properties.dtype
        for entry in mapping.entries()
        for name in entry.hf
    }


@dataclass(frozen=True)
class _Target:
    """The part of a load planner that FileSystemReader asks; every read of a plan goes into one box."""

    tensor: Tensor
    offset: tuple[int, ...]

    def resolve_tensor(self, item: Any) -> Tensor:
        part = self.tensor
        for axis, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, item: Any, tensor: Tensor) -> None: ...


def _problems(metadata: Metadata, mapping: ParameterMap, prefix: str) -> list[str]:
    """What keeps the parameters from being this model."""
    places = [(place(entry, mapping), entry) for entry in mapping.entries()]
    expected = {prefix + where.key: (where, entry) for where, entry in places}
    found = {
        key: value
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
        and (key.startswith(prefix) if prefix else not key.startswith(OTHER_STATE))
    }
    if any(PLACE in key for key in found) and not any(PLACE in key for key in expected):
        return ["it holds adapters alone; `mcore-rl convert merge` joins them with their model"]
    problems = [f"missing {key}" for key in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {key}" for key in sorted(found.keys() - expected.keys())]
    types = {found[key].properties.dtype for key in expected.keys() & found.keys()}
    if not types <= set(HF_DTYPES.values()):
        problems.append(f"types {sorted(map(str, types))}, not those of plain weights")
    for key in sorted(expected.keys() & found.keys()):
        (where, entry), shape = expected[key], tuple(found[key].size)
        padded = entry.rule.merge == "vocab" and shape[0] >= where.shape[0] and shape[1:] == where.shape[1:]
        if shape != where.shape and not padded:
            problems.append(f"{key} has shape {shape}, config.json asks for {where.shape}")
    return problems


def _check_files(directory: Path, metadata: Metadata) -> None:
    for index, info in metadata.storage_data.items():
        if Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
            raise CheckpointError(
                f"{directory}: {short(index.fqn)} points to {quoted(info.relative_path)}, not a file of its "
                "own"
            )
        if not (directory / info.relative_path).is_file():
            raise CheckpointError(f"{directory}: {info.relative_path} is missing")
