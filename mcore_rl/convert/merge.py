"""Adapters of a run or of PEFT: joined with their model into a Hugging Face directory, or by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_rl.checkpoint import manifest
from mcore_rl.convert.output import ConversionProgress
from mcore_rl.convert.to_hf import write_shards
from mcore_rl.errors import ConfigError
from mcore_rl.lora import Lora
from mcore_rl.model import weights_io
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.content import model_content
from mcore_rl.model.hf.files import EMBEDDING, hf_tensors, read_side_files, write_side_files
from mcore_rl.model.hf.parameters import HF_DTYPES, ParameterMap
from mcore_rl.model.hf.peft_files import adapter_reader, lora_of, write_adapter
from mcore_rl.model.hf.torch_dist import holds_torch_dist, torch_dist_types


def adapters_in(source: Path, model: Path) -> Lora:
    """What adapters a checkpoint, or a directory in PEFT's format, holds of the model in `model`.

    Raises:
        ConfigError: it holds none, or the run of the checkpoint had another model.
        CheckpointError: it is damaged.
    """
    if not holds_torch_dist(source):
        return lora_of(source, read_architecture(model))
    document = manifest.read(source).document
    told = document.get("config", {}).get("lora", {})
    if not told.get("rank"):
        raise ConfigError(f"{source}: its run trained no adapters; convert it with mcore-to-hf")
    then = document.get("inputs", {}).get("model.path", {})
    now = model_content(model, weights="weights" in then)
    if changed := [name for name, digest in then.items() if now.get(name, digest) != digest]:
        raise ConfigError(
            f"{model}: {' and '.join(changed)} are not those of the model that the adapters of {source} were "
            "trained beside; name that one"
        )
    return Lora(told["rank"], told["alpha"], tuple(told["targets"]), told["rslora"], path=source)


def write_merged(lora: Lora, directory: Path, *, model: Path, shard_bytes: int) -> ConversionProgress:
    """Write `model` with its adapters merged into the empty `directory` as safetensors."""
    arch = read_architecture(model)
    mapping, adapters = ParameterMap(arch, arch.vocab), AdapterMap(arch, lora)
    assert lora.path is not None
    read, low = weights_io.reader(model, mapping), adapter_reader(adapters, lora.path)
    types = _types(model, mapping)
    forms = {name: (shape, types[name]) for name, shape in mapping.hf_shapes().items()}
    merged = _Merged(read, low, adapters.hf_shapes(), lora.scale)
    progress = write_shards(directory, forms, merged, shard_bytes)
    write_side_files(read_side_files(model), directory, types[EMBEDDING])
    return progress


def write_alone(lora: Lora, directory: Path, *, model: Path) -> ConversionProgress:
    """Write adapters in PEFT's format into the empty `directory`."""
    adapters = AdapterMap(read_architecture(model), lora)
    assert lora.path is not None
    read = adapter_reader(adapters, lora.path)
    progress = ConversionProgress(len(adapters.hf_shapes()))
    tensors = {name: read(name) for name in adapters.hf_shapes()}
    write_adapter(adapters, tensors, directory, base=model.name)
    for tensor in tensors.values():
        progress.add(tensor.nbytes)
    return progress


def _types(model: Path, mapping: ParameterMap) -> Mapping[str, torch.dtype]:
    if holds_torch_dist(model):
        return torch_dist_types(model, mapping)
    return {name: HF_DTYPES[tensor.type] for name, tensor in hf_tensors(model, mapping).items()}


class _Merged:
    """Reads the tensors of a model, each with its adapter in it."""

    def __init__(
        self,
        read: Callable[[str], Tensor],
        low: Callable[[str], Tensor],
        having: Mapping[str, Any],
        scale: float,
    ) -> None:
        self._read, self._low, self._having, self._scale = read, low, having, scale

    def __call__(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of `names`, in their order."""
        for name in names:
            weight = self._read(name)
            down = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
            if down not in self._having:
                yield name, weight
                continue
            wide = torch.promote_types(weight.dtype, torch.float32)
            up = self._low(down.replace(".lora_A.", ".lora_B.")).to(wide)
            product = (up @ self._low(down).to(wide)).mul_(self._scale)
            yield name, product.add_(weight.to(wide)).to(weight.dtype)
