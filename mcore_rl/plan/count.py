"""Parameters on each rank of a layout, counted through the same table that loads the weights.

All ranks of a pipeline stage hold equally many: tensor parallelism cuts evenly (the vocabulary is padded
until it does) and so does expert parallelism. Which ones they hold differs; how many does not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import prod

from mcore_rl.lora import Lora
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.model.hf.parameters import CriticParameterMap, ParameterEntry, ParameterMap
from mcore_rl.model.layouts import padded_vocab
from mcore_rl.parallel.layout import Layout

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class StageCount:
    """Numbers of parameters on one rank of a pipeline stage."""

    matrices: int = 0
    """matrices of layers, cut over the tensor-parallel ranks"""
    vocabulary: int = 0
    """embedding and output layer, cut over the tensor-parallel ranks, padding included"""
    replicated: int = 0
    """norms, routers, a value head: all of them on every tensor-parallel rank"""
    experts: int = 0
    """parameters of this rank's share of the experts"""
    padding: int = 0
    """rows added to the vocabulary, in parameters, over all tensor-parallel ranks together"""
    copied: int = 0
    """second copy of a tied embedding on the last of several stages, over all tensor-parallel ranks"""

    @property
    def dense(self) -> int:
        """All but the experts: what the data-parallel ranks of a shard share."""
        return self.matrices + self.vocabulary + self.replicated

    @property
    def total(self) -> int:
        """On one rank."""
        return self.dense + self.experts

    def __add__(self, other: StageCount) -> StageCount:
        names = [field.name for field in fields(StageCount)]
        return StageCount(**{name: getattr(self, name) + getattr(other, name) for name in names})


def count_policy(arch: Architecture, layout: Layout) -> list[StageCount]:
    """One StageCount per pipeline stage of a policy, or of any model with a vocabulary head."""
    return _deal(ParameterMap, arch, layout, tied=arch.tied)


def count_critic(arch: Architecture, layout: Layout) -> list[StageCount]:
    """What each stage of the critic holds: the policy's, with the value head in place of the output layer."""
    return _deal(CriticParameterMap, arch, layout, tied=False)


def count_adapters(arch: Architecture, lora: Lora, layout: Layout) -> list[StageCount]:
    """What each stage of a policy has of adapters, which are trained in the place of its parameters."""
    layers = [StageCount()] * arch.layers
    mapping = AdapterMap(arch, lora)
    for entry in mapping.entries():
        (shape,) = mapping.shapes(entry.rule)
        part = _Tensors(entry.layer, False, _kind(entry), prod(shape))
        assert part.layer is not None
        layers[part.layer] += part.on_one_rank(arch, arch.vocab, layout.tensor, layout.expert)
    return [
        sum((layers[layer] for layer in layers_of(stage, arch.layers, layout)), StageCount())
        for stage in range(layout.pipeline)
    ]


def distinct(stages: Sequence[StageCount], layout: Layout) -> int:
    """Parameters of the whole model: replicated tensors once, padding and copies apart."""
    return sum(
        layout.tensor * (stage.matrices + stage.vocabulary)
        + stage.replicated
        + layout.expert * stage.experts
        - stage.padding
        - stage.copied
        for stage in stages
    )


def layers_of(stage: int, layers: int, layout: Layout) -> list[int]:
    """Layers (from 0) of a pipeline stage; interleaved stages own one stretch per virtual stage."""
    virtual = layout.virtual_pipeline or 1
    stretch = layers // (layout.pipeline * virtual)
    starts = [(chunk * layout.pipeline + stage) * stretch for chunk in range(virtual)]
    return [layer for start in starts for layer in range(start, start + stretch)]


def _deal(table: type[ParameterMap], arch: Architecture, layout: Layout, *, tied: bool) -> list[StageCount]:
    """The parts of a model to the stages that hold them."""
    embedding, layers, rest = _parts(table, arch, layout.tensor, layout.expert)
    stages = [
        sum((layers[layer] for layer in layers_of(stage, arch.layers, layout)), StageCount())
        for stage in range(layout.pipeline)
    ]
    stages[0] += embedding
    stages[-1] += rest
    if tied and layout.pipeline > 1:
        copied = layout.tensor * embedding.vocabulary - embedding.padding
        stages[-1] += replace(embedding, copied=copied)
    return stages


@lru_cache(maxsize=256)
def _parts(
    table: type[ParameterMap], arch: Architecture, tensor: int, expert: int
) -> tuple[StageCount, list[StageCount], StageCount]:
    """On one rank: the embedding, each layer, and what follows the last one."""
    padded = padded_vocab(arch, tensor)
    embedding, layers, rest = StageCount(), [StageCount()] * arch.layers, StageCount()
    for part in _tensors(table, arch):
        count = part.on_one_rank(arch, padded, tensor, expert)
        if part.layer is not None:
            layers[part.layer] += count
        elif part.is_embedding:
            embedding += count
        else:
            rest += count
    return embedding, layers, rest


@dataclass(frozen=True)
class _Tensors:
    """Tensors of the same kind in the same place."""

    layer: int | None
    is_embedding: bool
    kind: str
    size: int
    """parameters, all ranks together"""

    def on_one_rank(self, arch: Architecture, padded: int, tensor: int, expert: int) -> StageCount:
        if self.kind == "experts":  # dealt out evenly; each is whole on its rank
            return StageCount(experts=self.size // expert)
        if self.kind == "vocab":
            rows = self.size // arch.vocab * padded
            return StageCount(vocabulary=rows // tensor, padding=rows - self.size)
        if self.kind == "replicated":
            return StageCount(replicated=self.size)
        return StageCount(matrices=self.size // tensor)


@lru_cache
def _tensors(table: type[ParameterMap], arch: Architecture) -> list[_Tensors]:
    """The tensors of the whole model, from the table that loads it."""
    mapping = table(arch, arch.vocab)
    shapes = mapping.hf_shapes()
    sizes: Counter[tuple[int | None, bool, str]] = Counter()
    for entry in mapping.entries():
        layer = _LAYER.match(entry.megatron)
        place = (int(layer[1]) if layer else None, entry.megatron.startswith("embedding."), _kind(entry))
        sizes[place] += sum(prod(shapes[name]) for name in entry.hf)
    return [_Tensors(*place, size) for place, size in sizes.items()]


def _kind(entry: ParameterEntry) -> str:
    if entry.is_expert:
        return "experts"
    if entry.rule.merge == "vocab":
        return "vocab"
    return "replicated" if entry.rule.axis is None else "matrices"
