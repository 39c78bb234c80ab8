"""The exporter: a plan of which rank sends which HF tensors in which buckets, and the filling of the buckets.

Every rank that owns parameters (a pipeline stage's first tensor-parallel rank, a rank with experts of its
own) sends them itself, so that no byte travels through another rank on its way out. HF tensors are filled in
their place in memory out of the shards of the tensor-parallel ranks, and encoded there
(weights/encoding.py). Files, shared memory and broadcasts are channels that take the buckets.

Every owner takes its turn: its ranks fill bucket k + 1 while a thread sends bucket k. The thread uses process
groups and connections of its own, never those of the filling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from mcore_rl.errors import NumericsError, WeightSyncError
from mcore_rl.model.adapters import mergers
from mcore_rl.model.build import Model
from mcore_rl.model.hf.parameters import ParameterEntry, ParameterMap
from mcore_rl.model.weights_io import global_weights
from mcore_rl.parallel.control import gather_ranks, raise_everywhere
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.weights.encoding import PLAIN, Encoding, encoded_forms

GATHER_BYTES = 64 << 20
"""bytes of a bucket where nobody has chosen: two of them and the largest parameter are held at a time"""


@dataclass(frozen=True)
class Export:
    """What is exported: this rank's tensors, how the ranks share them out, and how they are encoded."""

    tensors: Mapping[str, Tensor]
    """global Megatron name -> this rank's shard of a parameter, or of its gradient"""
    mapping: ParameterMap
    mesh: Mesh
    encoding: Encoding = PLAIN
    merged: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """global name -> what adds an adapter to the shard, which then leaves this rank in place of it"""


def export_of(model: Model, encoding: Encoding = PLAIN) -> Export:
    """The parameters of a model, adapters merged into them."""
    merged = mergers(model.unwrapped)
    return Export(global_weights(model.unwrapped), model.mapping, model.mesh, encoding, merged)


# --- the plan: a pure function of what the ranks hold -------------------------------------------------------


@dataclass(frozen=True)
class OwnedParameter:
    """A parameter that a rank owns: the rank answers for it, alone of all."""

    megatron: str
    """global name"""
    dtype: torch.dtype
    shard_bytes: int
    """bytes of one tensor-parallel rank's shard"""


@dataclass(frozen=True)
class Slot:
    """One tensor in a bucket, under the name that a server or a file knows it by."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    """bytes from the bucket's start, a multiple of the type's size"""

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.begin + prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Target:
    """One HF tensor of a parameter, and the slots of what it is encoded as."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    slots: tuple[Slot, ...]

    @property
    def staged(self) -> int:
        """Bytes that the whole tensor takes before it can be encoded; 0 where its shards go into the slot."""
        if len(self.slots) == 1 and self.slots[0].shape == self.shape:
            return 0
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class BucketParameter:
    """One Megatron parameter of a bucket, as the HF tensors that it becomes."""

    megatron: str
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Bucket:
    """What travels at once, in one piece of bytes without gaps, from one rank."""

    owner: int
    """global rank"""
    parts: tuple[BucketParameter, ...]
    slots: tuple[Slot, ...]
    """the tensors of all parts, in the order of their bytes"""

    @property
    def nbytes(self) -> int:
        """Length."""
        return self.slots[-1].end


@dataclass(frozen=True)
class ExportPlan:
    """One export from one copy of the model: buckets in the order in which they are sent."""

    buckets: tuple[Bucket, ...]
    scratch: int
    """bytes for the largest shard that an owner receives of another tensor-parallel rank"""
    staged: int
    """bytes for the largest parameter that must be whole before it can be encoded"""

    @property
    def owners(self) -> list[int]:
        """Ranks that send, in order; each has its turn once."""
        return list(dict.fromkeys(bucket.owner for bucket in self.buckets))

    def of(self, owner: int) -> list[Bucket]:
        """The buckets of one turn."""
        return [bucket for bucket in self.buckets if bucket.owner == owner]


def plan_buckets(
    owned: Sequence[Sequence[OwnedParameter]],
    mapping: ParameterMap,
    tensor: int,
    bucket_bytes: int,
    encoding: Encoding = PLAIN,
) -> ExportPlan:
    """The buckets of all ranks: two of an owner's and its scratch take at most 2 x `bucket_bytes`.

    A parameter that is larger is a bucket of its own: servers load whole tensors.

    Args:
        owned: by global rank, what the rank owns, in its order.
        tensor: tensor-parallel degree.

    Raises:
        WeightSyncError: the tensors are not those of the model, each once.
    """
    cut = [h.shard_bytes for own in owned for h in own if is_cut(mapping.entry(h.megatron), tensor)]
    targets = [[(h, _targets(h, mapping, encoding)) for h in own] for own in owned]
    staged = max((sum(t.staged for t in made) for own in targets for _, made in own), default=0)
    scratch = max(cut, default=0)
    limit = bucket_bytes - (scratch + staged) // 2
    buckets = tuple(
        _lay_out(rank, group) for rank, own in enumerate(targets) for group in _grouped(own, limit)
    )
    found = [(slot.name, slot.shape) for bucket in buckets for slot in bucket.slots]
    expected = {name: shape for name, (shape, _) in encoded_forms(mapping, encoding, torch.float32).items()}
    check_complete(found, expected, "the ranks", "This is a bug in weights/buckets.py")
    return ExportPlan(buckets, scratch, staged)


def check_complete(
    found: Iterable[tuple[str, tuple[int, ...]]],
    expected: Mapping[str, tuple[int, ...]],
    place: str,
    remedy: str,
) -> None:
    """Every tensor of the model is there once, in its shape, and no other: asked before any server is told.

    SGLang ignores a name that it does not know, keeps what it is not sent, and dies of a wrong shape.

    Raises:
        WeightSyncError: `place` holds something else.
    """
    seen: dict[str, tuple[int, ...]] = {}
    twice = []
    for name, shape in found:
        twice += [name] if name in seen else []
        seen[name] = shape
    wrong = dict.fromkeys([*twice, *(n for n in {**seen, **expected} if seen.get(n) != expected.get(n))])
    if wrong:
        several = set(twice)
        lines = "; ".join(
            f"{name} {'twice' if name in several else f'{seen.get(name)}, not {expected.get(name)}'}"
            for name in list(wrong)[:5]
        )
        raise WeightSyncError(
            f"{place}: {len(wrong)} tensors are not those of the model, each once ({lines}); no server was "
            f"told. {remedy}"
        )


def is_cut(entry: ParameterEntry, tensor: int) -> bool:
    """Whether the tensor-parallel ranks each hold a shard of the parameter."""
    return tensor > 1 and entry.rule.axis is not None


Laid = tuple[OwnedParameter, Sequence[Target]]


def _targets(owned: OwnedParameter, mapping: ParameterMap, encoding: Encoding) -> list[Target]:
    """What a parameter becomes; the slots have no place yet."""
    entry = mapping.entry(owned.megatron)
    made = []
    for name, shape in zip(entry.hf, mapping.shapes(entry.rule), strict=True):
        forms = encoding.forms(entry.rule, name, (shape, owned.dtype))
        slots = tuple(Slot(key, *form, 0) for key, form in forms.items())
        made.append(Target(name, shape, owned.dtype, slots))
    return made


def _grouped(own: Sequence[Laid], limit: int) -> list[list[Laid]]:
    """One rank's parameters, in its order, into buckets of at most `limit` bytes."""
    groups: list[list[Laid]] = []
    used = 0
    for owned, targets in own:
        size = sum(slot.end for target in targets for slot in target.slots)
        if not groups or used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append((owned, targets))
        used += size
    return groups


def _lay_out(owner: int, group: Sequence[Laid]) -> Bucket:
    """Widest types first: every tensor then begins at a multiple of its type's size, without gaps."""
    slots = [slot for _, targets in group for target in targets for slot in target.slots]
    placed: dict[str, Slot] = {}
    offset = 0
    for slot in sorted(slots, key=lambda slot: -slot.dtype.itemsize):
        placed[slot.name] = Slot(slot.name, slot.shape, slot.dtype, offset)
        offset = placed[slot.name].end
    parts = tuple(
        BucketParameter(
            owned.megatron,
            tuple(
                Target(t.name, t.shape, t.dtype, tuple(placed[slot.name] for slot in t.slots))
                for t in targets
            ),
        )
        for owned, targets in group
    )
    return Bucket(owner, parts, tuple(placed.values()))


# --- the filling: collective over the ranks of a tensor-parallel group --------------------------------------


class Channel(Protocol):
    """How one owner's buckets leave it, in one export; opened with the memory that it needs."""

    failed: dict[str, str]
    """url -> why, of servers that take part no more"""

    def buffer(self, number: int) -> Tensor:
        """[bytes] uint8 on the model's device, to fill with bucket `number`; number - 2 has arrived."""
        ...

    def send(self, bucket: Bucket, number: int, *, last: bool) -> None:
        """Returns when the bucket has arrived wherever it goes to; runs in a thread. `last` of the export.

        Raises:
            WeightSyncError: a server refuses it. OSError: it cannot be written.
        """
        ...

    def close(self) -> None:
        """The turn is over: what was opened for it is given back."""
        ...


def plan_of(export: Export, bucket_bytes: int) -> ExportPlan:
    """How this rank's copy of the model is sent, the same on all of its ranks; collective over all copies."""
    mesh, mapping = export.mesh, export.mapping
    own = [
        OwnedParameter(name, tensor.dtype, tensor.numel() * tensor.dtype.itemsize)
        for name, tensor in export.tensors.items()
        if is_exported(mapping, name) and is_owner(mesh, mapping.entry(name))
    ]
    owned = [mine if copy == mesh.copy else [] for copy, mine in gather_ranks(mesh, (mesh.copy, own))]
    plan: ExportPlan | None = None
    error: WeightSyncError | None = None
    try:
        plan = plan_buckets(owned, mapping, mesh.layout.tensor, bucket_bytes, export.encoding)
    except WeightSyncError as caught:  # raised on the ranks of every copy
        error = caught
    raise_everywhere(mesh, error)
    assert plan is not None
    return plan


def is_exported(mapping: ParameterMap, name: str) -> bool:
    """False for a tied output layer, which is the embedding again."""
    return not (mapping.arch.tied and name == "output_layer.weight")


def is_owner(mesh: Mesh, entry: ParameterEntry) -> bool:
    """Whether this rank answers for a parameter, of all ranks of its copy that hold it or a shard of it."""
    copies = mesh.layout.copies
    if entry.is_expert:
        return mesh.expert_dp_rank % (mesh.layout.expert_data // copies) == 0
    return mesh.cp_rank == mesh.tp_rank == 0 and mesh.dp_rank % (mesh.layout.data // copies) == 0


def turns_of(plan: ExportPlan, mesh: Mesh) -> list[int]:
    """The owners whose turns this rank takes part in, in order: those of its tensor-parallel group."""
    together = set(dist.get_process_group_ranks(mesh.tp))
    return [owner for owner in plan.owners if owner in together]


def take_turn(export: Export, plan: ExportPlan, owner: int, channel: Channel | None) -> None:
    """The buckets of `owner`, which alone has a channel; every rank of its tensor-parallel group calls it.

    An error of the channel or of the encoding is raised when all buckets have been filled, so that no rank is
    left waiting.
    """
    if channel is None:
        for bucket in plan.of(owner):
            _give(bucket, export)
        return
    device = next(iter(export.tensors.values())).device
    filling = _Filling(export, plan, device)
    sent: Future[None] | None = None
    error: Exception | None = None
    with ThreadPoolExecutor(1) as thread:
        for number, bucket in enumerate(plan.of(owner)):
            filling.fill(bucket, channel.buffer(number))
            error = error or filling.error or _outcome(sent)
            last = bucket is plan.buckets[-1]
            sent = None if error else thread.submit(channel.send, bucket, number, last=last)
        error = error or _outcome(sent)
    if error is not None:
        raise error


def _outcome(sent: Future[None] | None) -> Exception | None:
    """What the thread's call raised, once it has returned."""
    error = sent.exception() if sent is not None else None
    if error is not None and not isinstance(error, Exception):
        raise error
    return error


class _Filling:
    """The owner's part of a turn."""

    def __init__(self, export: Export, plan: ExportPlan, device: torch.device) -> None:
        self.error: NumericsError | None = None
        """the first number that could not be encoded"""
        self._export = export
        self._scratch = torch.empty(plan.scratch, dtype=torch.uint8, device=device)
        self._staging = torch.empty(plan.staged, dtype=torch.uint8, device=device)

    def fill(self, bucket: Bucket, data: Tensor) -> None:
        """Put the HF tensors of `bucket` in their places in `data` [bytes]."""
        for part in bucket.parts:
            slots = [{slot.name: view(data, slot) for slot in target.slots} for target in part.targets]
            wholes = self._wholes(part, slots)
            self._place(part, wholes)
            for target, whole, out in zip(part.targets, wholes, slots, strict=True):
                if target.staged:
                    self._encode(target.name, whole, out)
        if data.is_cuda:
            torch.cuda.current_stream().synchronize()  # who reads it next is another thread, or process

    def _wholes(self, part: BucketParameter, slots: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Where each HF tensor is put together: in its slot, or where it waits to be encoded."""
        wholes, begin = [], 0
        for target, out in zip(part.targets, slots, strict=True):
            if target.staged:
                waiting = Slot(target.name, target.shape, target.dtype, begin)
                wholes.append(view(self._staging, waiting))
                begin = waiting.end
            else:
                wholes.append(next(iter(out.values())))
        return wholes

    def _place(self, part: BucketParameter, wholes: Sequence[Tensor]) -> None:
        """The owner's own shard, then those that the others send, one at a time."""
        mapping, mesh = self._export.mapping, self._export.mesh
        entry, ranks = mapping.entry(part.megatron), mesh.layout.tensor
        shard = _shard(self._export, part.megatron)
        if not is_cut(entry, ranks):
            mapping.place(entry, shard, 0, 1, wholes)
            return
        mapping.place(entry, shard, mesh.tp_rank, ranks, wholes)
        for rank in range(ranks):
            if rank != mesh.tp_rank:
                other = self._scratch[: shard.nbytes].view(shard.dtype).view(shard.shape)
                dist.recv(other, group_src=rank, group=mesh.tp)
                mapping.place(entry, other, rank, ranks, wholes)

    def _encode(self, name: str, whole: Tensor, out: Mapping[str, Tensor]) -> None:
        try:
            self._export.encoding.encode(name, whole, out)
        except NumericsError as error:  # raised at the end of the turn: the others still send
            self.error = self.error or error


def _give(bucket: Bucket, export: Export) -> None:
    """Another rank's part: its shards to the owner."""
    mesh = export.mesh
    owner = dist.get_group_rank(mesh.tp, bucket.owner)
    for part in bucket.parts:
        if is_cut(export.mapping.entry(part.megatron), mesh.layout.tensor):
            dist.send(_shard(export, part.megatron), group_dst=owner, group=mesh.tp)


def _shard(export: Export, megatron: str) -> Tensor:
    tensor = export.tensors[megatron].detach()
    tensor = dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor
    return (export.merged[megatron](tensor) if megatron in export.merged else tensor).contiguous()


def view(data: Tensor, slot: Slot) -> Tensor:
    """The tensor of a slot, in the bytes of its bucket."""
    return data[slot.begin : slot.end].view(slot.dtype).view(slot.shape)


# --- the simplest channel -----------------------------------------------------------------------------------


class _Kept:
    """A channel that keeps what it is given, in host memory."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.failed: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]

    def buffer(self, number: int) -> Tensor:
        return self._buffers[number % 2]

    def send(self, bucket: Bucket, number: int, *, last: bool) -> None:
        data = self.buffer(number)
        self.tensors |= {slot.name: view(data, slot).to("cpu", copy=True) for slot in bucket.slots}

    def close(self) -> None: ...


def plan_to_gather(tensors: Mapping[str, Tensor], mapping: ParameterMap, mesh: Mesh) -> ExportPlan:
    """A plan for calls of `gather` with tensors of these names, shapes and types; collective."""
    return plan_of(Export(tensors, mapping, mesh), GATHER_BYTES)


def gather(
    tensors: Mapping[str, Tensor], mapping: ParameterMap, mesh: Mesh, plan: ExportPlan | None = None
) -> dict[str, Tensor]:
    """Parameters, or their gradients, by global Megatron name -> whole HF tensors, each on one rank of copy
    0.

    Collective over all ranks. For verification: all of an owner's tensors are in host memory at the end.
    """
    export = Export(tensors, mapping, mesh)
    plan = plan or plan_to_gather(tensors, mapping, mesh)
    kept: dict[str, Tensor] = {}
    for owner in turns_of(plan, mesh) if mesh.copy == 0 else []:
        channel = None
        if owner == mesh.rank:
            device = next(iter(tensors.values())).device
            channel = _Kept(max(bucket.nbytes for bucket in plan.of(owner)), device)
        take_turn(export, plan, owner, channel)
        kept |= channel.tensors if channel is not None else {}
    return kept
