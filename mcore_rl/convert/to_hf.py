"""torch_dist -> Hugging Face: each parameter is read at whatever layout it was saved, split, and appended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from mcore_rl.convert.output import Progress
from mcore_rl.errors import ConfigError
from mcore_rl.model.architecture import read_architecture
from mcore_rl.model.hf_files import INDEX, SIDE_FILES, Form, SafetensorsWriter
from mcore_rl.model.mapping import Mapping
from mcore_rl.model.torch_dist import torch_dist_reader


def write_hf(source: Path, directory: Path, *, config: Path, shard_bytes: int) -> Progress:
    """Write the model part of the torch_dist `source` into the empty `directory` as safetensors.

    Args:
        config: HF directory whose config.json and tokenizer go with the weights.
        shard_bytes: a file holds no more, unless a single tensor does.

    Raises:
        ConfigError: the parameters are not those of config.json.
        CheckpointError: `source` is damaged.
    """
    if shard_bytes < 1:
        raise ConfigError(f"--shard-gb: {shard_bytes} bytes are too few for a file")
    arch = read_architecture(config)
    mapping = Mapping(arch, arch.vocab)
    read = torch_dist_reader(source, mapping)
    names = [name for entry in mapping.entries() for name in entry.hf]
    dtype = read("model.norm.weight").dtype
    shards = _shards({name: (mapping.hf_shape(name), dtype) for name in names}, shard_bytes)
    progress = Progress(len(names))
    weight_map = {}
    for number, forms in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(directory / file, forms) as writer:
            for name in forms:
                tensor = read(name)
                writer.write(name, tensor)
                progress.add(tensor.nbytes)
                weight_map[name] = file
    index = {"metadata": {"total_size": progress.bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=1))
    for name in SIDE_FILES:
        if (config / name).exists():
            shutil.copyfile(config / name, directory / name)
    return progress


def _shards(forms: dict[str, Form], limit: int) -> list[dict[str, Form]]:
    """In order, into files of at most `limit` bytes."""
    shards: list[dict[str, Form]] = [{}]
    held = 0
    for name, (shape, dtype) in forms.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and held + size > limit:
            shards.append({})
            held = 0
        shards[-1][name] = (shape, dtype)
        held += size
    return shards
