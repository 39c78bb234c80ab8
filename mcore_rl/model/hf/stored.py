"""Where the HF tensors of a model lie in its files: one by one, or the experts of a layer as one tensor.

transformers 5 holds the experts of a layer as `experts.gate_up_proj` [experts, 2 x intermediate, hidden],
gate before up, and `experts.down_proj` [experts, hidden, intermediate]. It writes them so where it is told
not to write the published form, which has a tensor for each expert and projection.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.stacked import piece

_FUSED = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<kind>gate_up_proj|down_proj)")
BLOCK = 128
"""rows and columns of a matrix in FP8 that share a scale"""
_MOST_EXPERTS = 2**12
"""a damaged file of no bytes may claim any number of them"""
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""types of weights, as safetensors writes them"""
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class StoredTensor:
    """One HF tensor: a tensor of a file, or a part of one."""

    file: Path
    name: str
    """in the file"""
    shape: tuple[int, ...]
    type: str
    """as safetensors writes it"""
    part: tuple[Any, ...] = field(default=(), repr=False)
    """index of the part; () for the whole"""
    scale: StoredTensor | None = None
    """of a matrix in FP8, whose `type` is then that of the product"""

    def read(self) -> Tensor:
        """The tensor, on the CPU; no more of the file is read."""
        with open_safetensors(self.file) as tensors:
            found = tensors.get_slice(self.name)[self.part] if self.part else tensors.get_tensor(self.name)
        return (
            found if self.scale is None else dequantize_blocks(found, self.scale.read()).to(TYPES[self.type])
        )


def dequantize_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """[rows, columns] in float32, by the scales of its blocks."""
    rows, columns = weight.shape
    spread = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.float() * spread


def stored_tensors(files: Mapping[str, Path], stacked: Collection[str] = ()) -> dict[str, StoredTensor]:
    """HF name -> where it lies, of the tensors `files` (name -> file), experts by their published names.

    Those of `stacked` go by the names of their pieces (hf.stacked).
    """
    stored: dict[str, StoredTensor] = {}
    for name, file in files.items():
        with open_safetensors(file) as tensors:
            found = tensors.get_slice(name)
            whole = StoredTensor(file, name, tuple(found.get_shape()), found.get_dtype())
        if name in stacked:
            stored |= _pieces(whole)
            continue
        fused = _FUSED.fullmatch(name)
        parts = dict(_experts(fused["experts"], fused["kind"], whole)) if fused else {name: whole}
        both = sorted(parts.keys() & stored.keys())
        if both:
            raise ConfigError(f"{both[0]} is in {stored[both[0]].file}, and in {name} of {file}; remove one")
        stored |= parts
    return stored


def _pieces(whole: StoredTensor) -> dict[str, StoredTensor]:
    """The pieces of a stacked tensor; itself if it cannot be one."""
    if not whole.shape or whole.shape[0] > _MOST_EXPERTS:
        return {whole.name: whole}
    return {
        piece(whole.name, number): replace(whole, shape=whole.shape[1:], part=(number,))
        for number in range(whole.shape[0])
    }


def _experts(experts: str, kind: str, whole: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """(published name, its part) of every projection in a fused tensor; the tensor itself if it cannot be."""
    projections = _PROJECTIONS[kind]
    if len(whole.shape) != 3 or whole.shape[0] > _MOST_EXPERTS or whole.shape[1] % len(projections):
        yield whole.name, whole
        return
    count, rows = whole.shape[0], whole.shape[1] // len(projections)
    for expert in range(count):
        for number, projection in enumerate(projections):
            part = (expert, slice(number * rows, (number + 1) * rows))
            shape = (rows, whole.shape[2])
            name = f"{experts}.{expert}.{projection}.weight"
            yield name, StoredTensor(whole.file, whole.name, shape, whole.type, part)


def open_safetensors(file: Path) -> Any:
    """An opened file; ConfigError where it is damaged."""
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises its own, untyped error for a damaged header
        raise ConfigError(f"{file}: not a readable safetensors file ({error}); export it again") from error
