"""What a checkpoint holds of a model and its optimizer: blocks of global tensors, in place, at any layout.

A piece is a view of a live tensor and says which block of which global tensor it is. Names, shapes and
offsets come from Megatron's own sharded state dict: Megatron can read the files, and any layout can.
The distributed optimizer gives a data-parallel rank a flat range of each parameter; such a range is a handful
of blocks (`blocks`), so its state is written and read where it lies: no gather, no copy, no superset.
Megatron's `fully_reshardable` format, whose tensors these are, gathers all of it on every rank instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from mcore_rl.errors import CheckpointError
from mcore_rl.model.adapters import adapter_parameters
from mcore_rl.model.build import Model
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.optimizer import Optimizer

_TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, extent) in elements per axis"""


@dataclass(frozen=True)
class Piece:
    """One block of a global tensor."""

    key: str
    shape: tuple[int, ...]
    """shape of the global tensor"""
    offset: tuple[int, ...]
    data: Tensor
    """the block itself, with as many axes as `shape`; loading writes into it"""
    written: bool
    """this rank saves it: of equal copies one does"""
    padded: bool = False
    """the first axis is padded to the layout (vocabulary): its size may differ from the saved one"""


@dataclass(frozen=True)
class _Shard:
    """A contiguous run of a local tensor that is one block of a global tensor."""

    tensor: Tensor
    """the local tensor: a parameter or a buffer"""
    start: int
    """where the run lies in the flat local tensor"""
    sharded: ShardedTensor

    @property
    def extent(self) -> tuple[int, ...]:
        """Shape of the block, with the axes that Megatron prepends (one expert of many)."""
        return (1,) * self.sharded.prepend_axis_num + tuple(self.sharded.local_shape)


def model_pieces(model: Model, prefix: str = "") -> list[Piece]:
    """Every parameter and persistent buffer of this rank's chunks."""
    return [
        Piece(
            shard.sharded.key,
            tuple(shard.sharded.global_shape),
            tuple(shard.sharded.global_offset),
            shard.tensor.detach().view(-1)[shard.start :][: math.prod(shard.extent)].view(shard.extent),
            is_main_replica(shard.sharded.replica_id),
            shard.sharded.allow_shape_mismatch,
        )
        for shard in _shards(model, prefix)
    ]


def optimizer_pieces(optimizer: Optimizer, prefix: str = "") -> list[Piece]:
    """Adam's moments, and float32 main weights where the model's are bfloat16; absent moments become 0."""
    shards: dict[int, list[_Shard]] = {}
    for shard in _shards(optimizer.model, prefix):
        shards.setdefault(id(shard.tensor), []).append(shard)
    return [
        piece
        for state in _states(optimizer)
        for shard in shards[id(state.parameter)]
        for name, flat in state.tensors.items()
        for piece in _state_pieces(f"optimizer.state.{name}", flat, state, shard)
    ]


def _state_pieces(name: str, flat: Tensor, state: _State, shard: _Shard) -> Iterator[Piece]:
    low = max(state.start, shard.start)
    high = min(state.start + flat.numel(), shard.start + math.prod(shard.extent))
    base, at = shard.sharded.global_offset, low - state.start
    replica = (
        shard.sharded.replica_id
    )  # (pipeline, tensor, data): a sharded state has no data-parallel copies
    written = is_main_replica(replica[:-1] if state.sharded and isinstance(replica, tuple) else replica)
    for offset, extent in blocks(shard.extent, low - shard.start, high - shard.start):
        numel = math.prod(extent)
        yield Piece(
            f"{name}.{shard.sharded.key}",
            tuple(shard.sharded.global_shape),
            tuple(b + o for b, o in zip(base, offset, strict=True)),
            flat[at : at + numel].view(extent),
            written,
            shard.sharded.allow_shape_mismatch,
        )
        at += numel


def blocks(shape: Sequence[int], low: int, high: int) -> list[Block]:
    """The flat row-major range [low, high) of a tensor as at most 2 * axes - 1 blocks, in order."""
    if low >= high:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-low // row), high // row
    if first > last:  # inside one row
        return _in_row(shape, last, low, high)
    zeros = (0,) * (len(shape) - 1)
    whole = [((first, *zeros), (last - first, *shape[1:]))] if first < last else []
    return [*_in_row(shape, first - 1, low, first * row), *whole, *_in_row(shape, last, last * row, high)]


def _in_row(shape: Sequence[int], index: int, low: int, high: int) -> list[Block]:
    row = math.prod(shape[1:])
    inner = blocks(shape[1:], low - index * row, high - index * row)
    return [((index, *offset), (1, *extent)) for offset, extent in inner]


def _shards(model: Model, prefix: str) -> Iterator[_Shard]:
    """Megatron's sharded tensors of this rank, with the local tensors that they are views of.

    Of a model whose weights are frozen, those of its adapters alone.
    """
    if model.adapters is not None:
        yield from _adapter_shards(model, model.adapters, prefix)
        return
    for chunk in model.unwrapped:
        # One key per layer: layers need not be alike, and Megatron drops the stacked form.
        described = chunk.sharded_state_dict(prefix=prefix, metadata={"non_homogeneous_layers": True})
        for entry in nested_values(described):
            if isinstance(entry, ShardedTensorFactory):  # [gate; up] of SwiGLU: two blocks
                for part in nested_values(entry.build()):
                    yield _Shard(entry.data, _start(part, entry.data), part)
            elif isinstance(entry, ShardedTensor):
                yield _Shard(_tensor(entry), 0, entry)
            elif isinstance(entry, ShardedObject) and _is_filled(entry.data) and not model.config.fp8:
                raise CheckpointError(
                    f"{entry.key}: a module keeps state that is no tensor, which a checkpoint does not hold"
                )


def _adapter_shards(model: Model, adapters: AdapterMap, prefix: str) -> Iterator[_Shard]:
    mesh = model.mesh
    copy = mesh.dp_rank * mesh.layout.context + mesh.cp_rank
    for name, parameter in adapter_parameters(model.unwrapped).items():
        entry = adapters.entry(name)
        axis = entry.rule.axis
        cuts = [] if axis is None else [(axis, mesh.tp_rank, mesh.layout.tensor)]
        other = mesh.tp_rank if axis is None else 0
        same = (0, 0, mesh.expert_dp_rank) if entry.is_expert else (0, other, copy)
        sharded = ShardedTensor.from_rank_offsets(prefix + name, parameter, *cuts, replica_id=same)
        yield _Shard(parameter, 0, sharded)


def _start(part: ShardedTensor, whole: Tensor) -> int:
    tensor = _tensor(part)
    start = int(tensor.storage_offset() - whole.storage_offset())
    inside = tensor.data_ptr() == whole.data_ptr() + start * whole.element_size()
    if not inside or not tensor.is_contiguous():
        raise CheckpointError(
            f"{part.key}: no contiguous part of its parameter; a bug in checkpoint/pieces.py"
        )
    return start


def _tensor(sharded: ShardedTensor) -> Tensor:
    if sharded.data is None:
        raise CheckpointError(f"{sharded.key}: without data; a bug in checkpoint/pieces.py")
    return sharded.data


def _is_filled(data: Any) -> bool:
    """Transformer Engine's modules have such state, empty unless they record scales (checkpoint/fp8.py)."""
    if data is None:
        return False
    return data.numel() > 0 if isinstance(data, Tensor) else bool(getattr(data, "getbuffer", lambda: b"x")())


@dataclass(frozen=True)
class _State:
    """What the optimizer keeps on this rank for a flat range of a local parameter."""

    parameter: Tensor
    start: int
    """first element of the range"""
    sharded: bool
    """every data-parallel rank has a range of its own"""
    tensors: dict[str, Tensor]
    """name -> [range]"""


def _states(optimizer: Optimizer) -> Iterator[_State]:
    for one in _parts(optimizer):
        _fill_state(one)
        if isinstance(one, DistributedOptimizer):
            yield from _distributed_states(one)
        else:
            yield from _replicated_states(one)


def _fill_state(one: Any) -> None:
    """Moments of 0 before the first update, as Adam makes them in it."""
    if one.init_state_fn is not None:
        one.init_state_fn(one.optimizer)
    if isinstance(one.optimizer, _TORCH_ADAM):
        for state in one.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _distributed_states(one: DistributedOptimizer) -> Iterator[_State]:
    for buffer in one.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    kept = one._get_main_param_and_optimizer_states(parameter)
                    tensors = _of_state(kept.pop("param"), kept, parameter)
                    yield _State(parameter, ranges["param"].start, True, tensors)


def _replicated_states(one: Any) -> Iterator[_State]:
    model_side = [*getattr(one, "float16_groups", []), *getattr(one, "fp32_from_fp32_groups", [])]
    for parameter in [p for group in model_side for p in group] or one.get_parameters():
        main = getattr(parameter, "main_param", parameter)
        yield _State(parameter, 0, False, _of_state(main, one.optimizer.state[main], parameter))


def _of_state(main: Tensor, kept: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    tensors = {name: kept[name].view(-1) for name in ("exp_avg", "exp_avg_sq") if name in kept}
    if main.dtype != parameter.dtype:  # else it is the parameter itself, which the model saves
        tensors["param"] = main.detach().view(-1)
    return tensors


def count_updates(optimizer: Optimizer) -> int:
    """Updates made so far, by the schedule; Adam's own counts agree.

    Raises:
        CheckpointError: they do not.
    """
    updates = int(optimizer.schedule.num_steps)
    for one in _parts(optimizer):
        counts = {int(state["step"]) for state in one.optimizer.state.values() if "step" in state}
        counts |= {int(group["step"]) for group in one.optimizer.param_groups if "step" in group}
        if counts - {updates}:
            raise CheckpointError(
                f"Adam counts {sorted(counts)} updates, the schedule {updates}; this is a bug"
            )
    return updates


def set_updates(optimizer: Optimizer, updates: int) -> None:
    """Continue after `updates` updates: the learning rate's schedule, and Adam's bias correction."""
    optimizer.schedule.num_steps = updates
    optimizer.schedule.step(0)
    for one in _parts(optimizer):
        if isinstance(one.optimizer, _TORCH_ADAM):  # a count of its own for every parameter
            for state in one.optimizer.state.values():
                state["step"] = torch.tensor(float(updates))
        else:  # Transformer Engine's and Apex's FusedAdam
            for group in one.optimizer.param_groups:
                group["step"] = updates


def _parts(optimizer: Optimizer) -> list[Any]:
    """Megatron's optimizers of this rank: one for experts and one for the rest, where there are any."""
    chained = getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron])
    return [one for one in chained if one.optimizer is not None]
