"""torch_dist -> Hugging Face: each parameter is read at whatever layout it was saved, split, and appended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mcore_rl.convert.output import Progress
from mcore_rl.errors import ConfigError
from mcore_rl.model.architecture import read_architecture
from mcore_rl.model.hf_files import INDEX, Form, SafetensorsWriter, copy_side_files
from mcore_rl.model.mapping import Mapping
from mcore_rl.model.quantize import (
    SCALE,
    is_quantized,
    quantization_config,
    quantize_blocks,
    quantized_shapes,
)
from mcore_rl.model.torch_dist import torch_dist_reader


def write_hf(
    source: Path, directory: Path, *, config: Path, shard_bytes: int, quantized: bool = False
) -> Progress:
    """Write the model part of the torch_dist `source` into the empty `directory` as safetensors.

    Args:
        config: HF directory whose config.json and tokenizer go with the weights.
        shard_bytes: a file holds no more, unless a single tensor does.
        quantized: in FP8 for a server (model.quantize).

    Raises:
        ConfigError: the parameters are not those of config.json.
        CheckpointError: `source` is damaged.
    """
    if shard_bytes < 1:
        raise ConfigError(f"--shard-gb: {shard_bytes} bytes are too few for a file")
    arch = read_architecture(config)
    mapping = Mapping(arch, arch.vocab)
    read = torch_dist_reader(source, mapping)
    dtype = read("model.norm.weight").dtype
    forms = _forms(mapping, dtype, quantized=quantized)
    shards = _shards(forms, shard_bytes)
    progress = Progress(len(forms))
    weight_map = {}
    for number, forms in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(directory / file, forms) as writer:
            for name, tensor in _tensors(forms, read, quantized=quantized):
                writer.write(name, tensor)
                progress.add(tensor.nbytes)
                weight_map[name] = file
    index = {"metadata": {"total_size": progress.bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=1))
    copy_side_files(config, directory, dtype, quantization_config(mapping.hf_shapes()) if quantized else None)
    return progress


def _forms(mapping: Mapping, dtype: torch.dtype, *, quantized: bool) -> dict[str, Form]:
    """Of every tensor in the order of the table; a scale follows its weight."""
    shapes = mapping.hf_shapes()
    whole = quantized_shapes(shapes)
    forms: dict[str, Form] = {}
    for name, shape in shapes.items():
        if quantized and is_quantized(name):
            forms[name] = (shape, torch.float8_e4m3fn)
            forms[name + SCALE] = (whole[name + SCALE], torch.float32)
        else:
            forms[name] = (shape, dtype)
    return forms


def _tensors(
    forms: Iterable[str], read: Callable[[str], Tensor], *, quantized: bool
) -> Iterator[tuple[str, Tensor]]:
    """In the order of `forms`; a weight is read once for itself and its scale, if they share a file."""
    made: dict[str, Tensor] = {}
    for name in forms:
        weight = name.removesuffix(SCALE)
        if quantized and is_quantized(weight):
            if name not in made:
                made = quantize_blocks(weight, read(weight))
            yield name, made.pop(name)
        else:
            yield name, read(name)


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
