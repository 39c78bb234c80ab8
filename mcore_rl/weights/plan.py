"""Which rank sends which HF tensors to running servers, in which buckets: a pure function, no tensors.

Every rank that owns parameters (a pipeline stage's first tensor-parallel rank, a rank with experts of its
own) sends them itself, so that no byte travels through another rank on its way out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mcore_rl.errors import WeightSyncError
from mcore_rl.model.mapping import Mapping


@dataclass(frozen=True)
class Held:
    """A parameter that a rank owns: the rank answers for it, alone of all."""

    megatron: str
    """global name"""
    dtype: torch.dtype
    shard_bytes: int
    """of one tensor-parallel rank"""


@dataclass(frozen=True)
class Slot:
    """One HF tensor in a bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    """bytes from the bucket's start, a multiple of the type's size"""

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.begin + torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """One Megatron parameter of a bucket, as the HF tensors that it becomes."""

    megatron: str
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Bucket:
    """What travels at once, in one piece of bytes without gaps, from one rank."""

    owner: int
    """global rank"""
    parts: tuple[Part, ...]

    @property
    def slots(self) -> list[Slot]:
        """In the order of their bytes."""
        return [slot for part in self.parts for slot in part.slots]

    @property
    def nbytes(self) -> int:
        """Length."""
        return self.parts[-1].slots[-1].end


@dataclass(frozen=True)
class Plan:
    """One publish from one copy of the model: buckets in the order in which they are sent."""

    buckets: tuple[Bucket, ...]
    scratch: int
    """bytes for the largest shard that an owner receives of another tensor-parallel rank"""

    @property
    def owners(self) -> list[int]:
        """Ranks that send, in order; each has its turn once."""
        return list(dict.fromkeys(bucket.owner for bucket in self.buckets))

    def of(self, owner: int) -> list[Bucket]:
        """The buckets of one turn."""
        return [bucket for bucket in self.buckets if bucket.owner == owner]


def plan_buckets(held: Sequence[Sequence[Held]], mapping: Mapping, tensor: int, bucket_bytes: int) -> Plan:
    """The buckets of all ranks: two of an owner's and its scratch take at most 2 x `bucket_bytes`.

    A parameter that is larger is a bucket of its own: servers load whole tensors.

    Args:
        held: by global rank, what the rank owns, in its order.
        tensor: tensor-parallel degree.

    Raises:
        WeightSyncError: the tensors are not those of the model, each once.
    """
    cut = [h for own in held for h in own if is_cut(mapping, h.megatron, tensor)]
    scratch = max((h.shard_bytes for h in cut), default=0)
    buckets = tuple(
        bucket
        for rank, own in enumerate(held)
        for bucket in _of_rank(rank, own, mapping, bucket_bytes - scratch // 2)
    )
    _check_complete(buckets, mapping)
    return Plan(buckets, scratch)


def is_cut(mapping: Mapping, megatron: str, tensor: int) -> bool:
    """Whether the tensor-parallel ranks each hold a shard of the parameter."""
    return tensor > 1 and mapping.entry(megatron).rule.axis is not None


def _of_rank(rank: int, held: Sequence[Held], mapping: Mapping, limit: int) -> list[Bucket]:
    groups: list[list[Held]] = []
    used = 0
    for one in held:
        size = sum(_hf_bytes(mapping, name, one) for name in mapping.entry(one.megatron).hf)
        if not groups or used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(one)
        used += size
    return [Bucket(rank, _lay_out(group, mapping)) for group in groups]


def _lay_out(group: Sequence[Held], mapping: Mapping) -> tuple[Part, ...]:
    """Widest types first: every tensor then begins at a multiple of its type's size, without gaps."""
    parts = []
    offset = 0
    for one in sorted(group, key=lambda one: -one.dtype.itemsize):
        slots = []
        for name in mapping.entry(one.megatron).hf:
            slots.append(Slot(name, mapping.hf_shape(name), one.dtype, offset))
            offset = slots[-1].end
        parts.append(Part(one.megatron, tuple(slots)))
    return tuple(parts)


def _hf_bytes(mapping: Mapping, name: str, held: Held) -> int:
    return torch.Size(mapping.hf_shape(name)).numel() * held.dtype.itemsize


def _check_complete(buckets: Sequence[Bucket], mapping: Mapping) -> None:
    """Before any server is told: SGLang ignores a name that it does not know, and keeps what is not sent."""
    sent = Counter(slot.name for bucket in buckets for slot in bucket.slots)
    expected = mapping.hf_shapes().keys()
    wrong = sorted((expected ^ sent.keys()) | {name for name, times in sent.items() if times > 1})
    if wrong:
        raise WeightSyncError(
            f"the ranks do not own every tensor of the model once: {', '.join(wrong[:5])} and others, "
            f"{len(wrong)} in all; no server was told. This is a bug in weights/plan.py"
        )
