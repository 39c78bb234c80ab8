"""Parameters on each rank of a layout, counted through the same table that loads the weights.

All ranks of a pipeline stage hold equally many: tensor parallelism cuts evenly (the vocabulary is padded
until it does) and so does expert parallelism. Which ones they hold differs; how many does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import prod

from mcore_rl.model.architecture import Architecture
from mcore_rl.model.critic import CriticMapping
from mcore_rl.model.mapping import Entry, Mapping
from mcore_rl.model.spec import padded_vocab
from mcore_rl.parallel.mesh import Layout

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


@dataclass(frozen=True)
class StageCount:
    """Numbers of parameters on one rank of a pipeline stage."""

    matrices: int = 0
    """of layers, cut over the tensor-parallel ranks"""
    vocabulary: int = 0
    """embedding and output layer, cut over the tensor-parallel ranks, padding included"""
    replicated: int = 0
    """norms, routers, a value head: all of them on every tensor-parallel rank"""
    experts: int = 0
    """of this rank's share of the experts"""
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
    return _deal(Mapping, arch, layout, tied=arch.tied)


def count_critic(arch: Architecture, layout: Layout) -> list[StageCount]:
    """As count_policy, with the value head in place of the output layer."""
    return _deal(CriticMapping, arch, layout, tied=False)


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


def _deal(table: type[Mapping], arch: Architecture, layout: Layout, *, tied: bool) -> list[StageCount]:
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
    table: type[Mapping], arch: Architecture, tensor: int, expert: int
) -> tuple[StageCount, list[StageCount], StageCount]:
    """On one rank: the embedding, each layer, and what follows the last one."""
    mapping = table(arch, padded_vocab(arch, tensor))
    shapes = mapping.hf_shapes()
    embedding, layers, rest = StageCount(), [StageCount()] * arch.layers, StageCount()
    for entry in mapping.entries():
        count = _on_one_rank(entry, sum(prod(shapes[name]) for name in entry.hf), mapping, tensor, expert)
        layer = _LAYER.match(entry.megatron)
        if layer:
            layers[int(layer[1])] += count
        elif entry.megatron.startswith("embedding."):
            embedding += count
        else:
            rest += count
    return embedding, layers, rest


def _on_one_rank(entry: Entry, size: int, mapping: Mapping, tensor: int, ep: int) -> StageCount:
    """`size`: of the entry's HF tensors together."""
    expert = _EXPERT.search(entry.megatron)
    if expert:  # experts are dealt out in stretches; those of expert-parallel rank 0 stand for every rank's
        experts = mapping.arch.experts.count if mapping.arch.experts else 0
        return StageCount(experts=size if int(expert[1]) < experts // ep else 0)
    if entry.rule.merge == "vocab":
        padded = size // mapping.arch.vocab * mapping.vocab_rows
        return StageCount(vocabulary=padded // tensor, padding=padded - size)
    if entry.rule.axis is None:
        return StageCount(replicated=size)
    return StageCount(matrices=size // tensor)
