"""Which parameters the adapters of a model have, at any layout: rules, made of those of the frozen matrices.

Each matrix that Hugging Face has apart has an A and a B of its own, as PEFT means it: query, key and value
are three, gate and up two, though Megatron has one layer for them. A layer whose outputs are cut over the
tensor-parallel ranks has A on every rank and B cut like the outputs; one whose inputs are cut has A cut like
the inputs and B on every rank; an expert is never cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.lora import Lora
from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.hf.tables import Rule, rules_of

Cut = Literal["outputs", "inputs"] | None
"""what of a linear layer is cut over the tensor-parallel ranks"""

_LAYERS = {"linear_qkv": "qkv", "linear_proj": "proj", "linear_fc1": "fc1", "linear_fc2": "fc2"}
_PREFIX = "base_model.model."
"""what PEFT writes before the name of a tensor"""
PLACE = ".adapter."
"""what stands in the Megatron name of an adapter's parameter between its layer's name and its own"""


class AdapterMap(ParameterMap):
    """The table of a model's adapters: Megatron names and PEFT's, and the tensors of one rank."""

    def __init__(self, arch: Architecture, lora: Lora) -> None:
        """Raises ConfigError for a target that the family has not, or not as matrices of their own."""
        super().__init__(arch, arch.vocab)
        self.lora = lora
        self._bases = {rule.megatron: rule for rule in _targeted(arch, lora)}
        self._rules = {one.megatron: one for rule in self._bases.values() for one in _of(rule)}
        self._sides["rank"] = lora.rank

    def base_of(self, megatron: str) -> Rule | None:
        """The rule of a frozen parameter, by its global name, where its layer has adapters."""
        return self._bases.get(self.template(megatron))


def cut_of(base: Rule) -> Cut:
    """How the layer of a frozen matrix is cut."""
    if base.axis is None:
        return None
    return "inputs" if base.merge == "single" and base.axis == 1 else "outputs"


def matrices_of(base: Rule) -> tuple[str, ...]:
    """The names of the HF matrices that a frozen parameter is made of, as the last part of PEFT's."""
    return tuple(name.removesuffix(".weight").rpartition(".")[2] for name in base.hf)


def matrices_with_adapters(mapping: AdapterMap) -> tuple[str, ...]:
    """The last parts of the names of all HF matrices that have an adapter, such as `q_proj`, sorted."""
    modules = (name.rpartition(".lora_")[0] for name in mapping.hf_shapes())
    return tuple(sorted({module.rpartition(".")[2] for module in modules}))


def _targeted(arch: Architecture, lora: Lora) -> Iterator[Rule]:
    found = set[str]()
    for rule in rules_of(arch):
        layer, _, kind = rule.megatron.rpartition(".")
        target = _LAYERS.get(layer.rpartition(".")[2])
        if kind != "weight" or target is None:
            continue
        target = "experts" if "{expert}" in rule.megatron else target
        if target not in lora.targets:
            continue
        if rule.joined or rule.merge not in ("single", "stack", "qkv"):
            raise ConfigError(
                f"lora.targets: {arch.family} has the matrices of {target!r} in one tensor, for which "
                f"adapters are not supported; leave {target!r} out, or take a model that has them apart"
            )
        found.add(target)
        yield rule
    if missing := [target for target in lora.targets if target not in found]:
        raise ConfigError(
            f"lora.targets: {missing[0]!r} names no matrix of this {arch.family} model that can have an "
            "adapter; leave it out"
        )


def _of(base: Rule) -> Iterator[Rule]:
    """A and B of every HF matrix of a frozen parameter."""
    layer, cut = base.megatron.removesuffix(".weight"), cut_of(base)
    for name, hf, shape in zip(matrices_of(base), base.hf, base.shapes, strict=True):
        outputs, inputs = shape.split()
        for letter, sides, axis in (
            ("A", f"rank {inputs}", 1 if cut == "inputs" else None),
            ("B", f"{outputs} rank", 0 if cut == "outputs" else None),
        ):
            yield Rule(
                f"{layer}{PLACE}lora_{letter}.{name}",
                (f"{_PREFIX}{hf.removesuffix('.weight')}.lora_{letter}.weight",),
                (sides,),
                axis=axis,
                layers=base.layers,
                needs=base.needs,
            )


def random_adapters(mapping: AdapterMap) -> Callable[[str], Tensor]:
    """The numbers that training starts from, by seed and name: A uniform as PEFT draws it, B 0."""
    shapes = mapping.hf_shapes()
    order = {name: i for i, name in enumerate(sorted(shapes))}

    def read(name: str) -> Tensor:
        shape = shapes[name]
        if name.endswith("lora_B.weight"):
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(mapping.lora.seed * 1_000_003 + order[name])
        bound = 1 / math.sqrt(shape[1])  # Kaiming's, with PEFT's a = sqrt(5)
        return (2 * torch.rand(shape, generator=generator) - 1) * bound

    return read
