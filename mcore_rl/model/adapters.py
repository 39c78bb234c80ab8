"""Low-rank adapters on Megatron's linear layers: parallel layers of their own beside frozen ones.

A layer answers W x + scale B (A x). What is cut over the tensor-parallel ranks (model.hf.adapters) and what
is exchanged are the `rank` numbers of a token, never its states:

| of the layer    | A x is                                | exchanged                                    |
|-----------------|---------------------------------------|----------------------------------------------|
| outputs are cut | whole on every rank, or of its tokens | its gradient summed, or gathered over tokens |
| inputs are cut  | a part of the sum on every rank       | summed, or summed and scattered over tokens  |

"or": under sequence parallelism. Legend: T tokens, r the rank, I and O inputs and outputs on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from mcore_rl.model import weights_io
from mcore_rl.model.hf.adapters import PLACE, AdapterMap, Cut, cut_of, matrices_of
from mcore_rl.model.hf.tables import Rule
from mcore_rl.parallel.mesh import Mesh

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Cutting:
    """How a layer is cut over the tensor-parallel ranks."""

    what: Cut
    sequence: bool
    """states between layers are cut by tokens"""


class Adapter(nn.Module):
    """What is added to one linear layer, for the matrices that Hugging Face has apart in it."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
        scale: float,
        cutting: Cutting,
        groups: int | None,
        dtype: torch.dtype,
    ) -> None:
        """A and B are made without numbers.

        Args:
            shapes: name of a matrix -> [r, I] of its A and [O, r] of its B on this rank, in Megatron's order.
            groups: key heads of this rank, where the outputs are a group's queries, key and value in turns.
        """
        super().__init__()
        self.scale, self.cutting, self.groups = scale, cutting, groups
        self.on = True
        # In pairs: of a plain mapping, torch sorts the names.
        self.lora_A = nn.ParameterDict((n, torch.empty(a, dtype=dtype)) for n, (a, _) in shapes.items())
        self.lora_B = nn.ParameterDict((n, torch.empty(b, dtype=dtype)) for n, (_, b) in shapes.items())

    def forward(self, x: Tensor) -> Tensor:
        """[T, ..., I] -> [T, ..., O]."""
        down, up = list(self.lora_A.values()), list(self.lora_B.values())
        narrow = self._exchanged(F.linear(x, down[0] if len(down) == 1 else torch.cat(down))) * self.scale
        parts = narrow.split([len(one) for one in down], dim=-1)
        answers = [F.linear(part, one) for part, one in zip(parts, up, strict=True)]
        return self._arranged(answers, -1)

    def _exchanged(self, narrow: Tensor) -> Tensor:
        """A x of this rank -> of all that B is to see."""
        what, sequence = self.cutting.what, self.cutting.sequence
        if what == "outputs":
            if sequence:
                return gather_from_sequence_parallel_region(narrow)
            return copy_to_tensor_model_parallel_region(narrow)
        if what == "inputs":
            if sequence:
                return reduce_scatter_to_sequence_parallel_region(narrow)
            return reduce_from_tensor_model_parallel_region(narrow)
        return narrow

    def _arranged(self, parts: list[Tensor], dim: int) -> Tensor:
        """Outputs of the matrices, along `dim`, in the order in which the layer has them."""
        if self.groups is None:
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        dim %= parts[0].ndim
        grouped = [part.unflatten(dim, (self.groups, -1)) for part in parts]
        return torch.cat(grouped, dim + 1).flatten(dim, dim + 1)

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's own weight [O, I] plus scale B A, added in float32 or wider, rounded once."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        products = [
            b.detach().to(wide) @ a.detach().to(wide)
            for a, b in zip(self.lora_A.values(), self.lora_B.values(), strict=True)
        ]
        return self._arranged(products, 0).mul_(self.scale).add_(weight.detach().to(wide)).to(weight.dtype)


@cache
def _adapted(linear: Any) -> Any:
    """The class of a linear layer that has an adapter; an object's class is set to it."""

    class Adapted(linear):
        adapter: Adapter

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            output, bias = super().forward(x, *args, **kwargs)
            return output + self.adapter(x) if self.adapter.on else output, bias

    Adapted.__name__ = Adapted.__qualname__ = f"Adapted{linear.__name__}"
    return Adapted


def attach(chunks: Iterable[GPTModel], mapping: AdapterMap, mesh: Mesh, read: Read) -> None:
    """Give the layers of unwrapped, loaded chunks their adapters, and their numbers by `read`."""
    chunks = list(chunks)
    for chunk in chunks:
        for name, layer in _targets(chunk, mapping):
            base = mapping.base_of(name)
            assert base is not None
            _give(layer, base, name, mapping, mesh)
    with torch.no_grad():
        for name, parameter in adapter_parameters(chunks).items():
            entry = mapping.entry(name)
            hf = [read(one) for one in entry.hf]
            parameter.copy_(mapping.to_shard(entry, hf, mesh.tp_rank, mesh.layout.tensor))
            # Under sequence parallelism a copy that all ranks hold saw the tokens of this one: see `Adapter`.
            parameter.sequence_parallel = (  # pyright: ignore[reportAttributeAccessIssue]
                mesh.layout.sequence and entry.rule.axis is None
            )
            weights_io.mark(parameter, entry)


def _targets(chunk: GPTModel, mapping: AdapterMap) -> list[tuple[str, Any]]:
    """Global name of the weight -> layer, of those that get adapters."""
    found = []
    for name, _ in chunk.named_parameters():
        named = weights_io.globalize(name, chunk)
        if mapping.base_of(named) is not None:
            assert name.endswith(".weight"), f"{name} is one of several of its layer: no place for an adapter"
            found.append((named, chunk.get_submodule(name.removesuffix(".weight"))))
    return found


def _give(layer: Any, base: Rule, name: str, mapping: AdapterMap, mesh: Mesh) -> None:
    size, cut = mesh.layout.tensor, cut_of(base) if mesh.layout.tensor > 1 else None
    shapes = {}
    for matrix in matrices_of(base):
        pair = []
        for letter in "AB":
            rule = mapping.entry(f"{name.removesuffix('.weight')}{PLACE}lora_{letter}.{matrix}").rule
            shape = list(mapping.shapes(rule)[0])
            if rule.axis is not None:
                shape[rule.axis] //= size
            pair.append(tuple(shape))
        shapes[matrix] = tuple(pair)
    groups = mapping.arch.kv_heads // size if base.merge == "qkv" else None
    cutting = Cutting(cut, mesh.layout.sequence)
    layer.adapter = Adapter(shapes, mapping.lora.scale, cutting, groups, layer.weight.dtype)
    layer.adapter.to(layer.weight.device)
    layer.__class__ = _adapted(type(layer))


def adapter_parameters(chunks: Iterable[GPTModel]) -> dict[str, nn.Parameter]:
    """Global Megatron name -> parameter, of the adapters alone."""
    named = weights_io.global_parameters(chunks)
    return {name: parameter for name, parameter in named.items() if PLACE in name}


def mergers(chunks: Iterable[GPTModel]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Global name of a frozen weight -> what adds its adapter to this rank's shard of it."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for chunk in chunks:
        for name, layer in chunk.named_modules():
            if isinstance(layer, Adapter):
                weight = f"{name.removesuffix('.adapter')}.weight"
                found[weights_io.globalize(weight, chunk)] = layer.merged
    return found


class AdaptersOff:
    """The frozen model inside `resident()`: what a reference is, without a second model."""

    def __init__(self, chunks: Iterable[GPTModel]) -> None:
        self._adapters = [m for chunk in chunks for m in chunk.modules() if isinstance(m, Adapter)]

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Layers answer without their adapters."""
        before = [adapter.on for adapter in self._adapters]
        self._set([False] * len(before))
        try:
            yield
        finally:
            self._set(before)

    def _set(self, on: list[bool]) -> None:
        for adapter, value in zip(self._adapters, on, strict=True):
            adapter.on = value
