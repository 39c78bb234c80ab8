"""Numbers that are not finite: the micro-batch that brings them is found, named and kept for a replay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.checkpoint import Checkpoints, fp8_pieces, model_pieces
from mcore_rl.config import Config
from mcore_rl.errors import ConfigError, StorageError
from mcore_rl.model.build import Model, TrainedChunk, gather_no_more
from mcore_rl.model.step import forward_backward
from mcore_rl.parallel.control import gather_ranks
from mcore_rl.parallel.head.divergence import Against
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout import experts as routing
from mcore_rl.training.metrics import losses_are_finite
from mcore_rl.training.model_passes import Update
from mcore_rl.types import PackedBatch

SAMPLE = "sample"
"""field of a row: the number of the sample that it belongs to, in `Update.ids`"""
TENSORS = ("tokens", "position_ids", "cu_seqlens", "rows", "targets", "sequence")


def keep_broken(config: Config, align: int, update: Update) -> str:
    """Find the first micro-batch that is not finite alone and keep it in RUN_DIR/numerics, with the weights.

    Collective, with the model's weights and gradients on the device. Says what was found, the same on every
    rank.

    Args:
        align: what the packed lengths of the micro-batches are multiples of.
    """
    mesh = update.optimizer.model.mesh
    against = update.against or [None] * len(update.batches)
    flags = [_is_broken_alone(update, *pair) for pair in zip(update.batches, against, strict=True)]
    ranks = gather_ranks(mesh, (flags, mesh.dp_rank))
    broken = [(i, rank) for i in range(len(flags)) for rank, (its, _) in enumerate(ranks) if its[i]]
    if not broken:
        return (
            "Computed again alone, every micro-batch is finite: their sum overflows, or a device computed "
            "wrongly once. Start again with --resume; if that ends here too, lower optimizer.lr"
        )
    index, rank = broken[0]
    replica = ranks[rank][1]
    lead = next(r for r, (_, data) in enumerate(ranks) if data == replica)
    found = {
        "kind": update.kind,
        "step": update.step,
        "micro_batch": index,
        "replica": replica,
        "ranks": [r for i, r in broken if i == index],
        "temperature": update.temperature,
        "align": align,
    }
    box: list[Any] = [{**found, **to_json(update.batches[index], update.ids)} if mesh.rank == lead else None]
    dist.broadcast_object_list(box, src=lead, group=mesh.world)
    where = (
        f"micro-batch {index} of replica {replica} on ranks {', '.join(map(str, found['ranks']))}, samples "
        f"{', '.join(box[0]['samples'][:8])}{', ...' if len(box[0]['samples']) > 8 else ''}"
    )
    root = config.run.dir / "numerics"
    try:
        _save(config, update, box[0])
    except (StorageError, ConfigError) as error:  # no room, or the directory is not ours
        return f"It begins in {where}; it could not be kept: {error}"
    return f"It begins in {where}; --replay {root / f'step_{update.step}'} shows the value"


def _save(config: Config, update: Update, recorded: Mapping[str, Any]) -> None:
    """A checkpoint of the model alone, whose document holds the micro-batch."""
    model = update.optimizer.model
    root, timeout = config.run.dir / "numerics", config.train.step_timeout
    checkpoints = Checkpoints(root, model.mesh, keep=2, background=False, timeout=timeout)
    with checkpoints.open():
        document = {"config": config.model_dump(mode="json"), "numerics": recorded}
        checkpoints.save(update.step, [*model_pieces(model), *fp8_pieces(model)], document)


def _is_broken_alone(update: Update, batch: PackedBatch, against: Against | None) -> bool:
    """A loss or gradient of this micro-batch is not finite on THIS rank: nothing is reduced over replicas."""
    model = update.optimizer.model
    update.optimizer.zero_grad()
    with _unreduced(model):
        batches = alone(batch, model.mesh)
        others = [against] * len(batches)
        sums = forward_backward(model, batches, update.objective, update.temperature, against=others)
    return not (losses_are_finite(sums) and gradients_are_finite(model))


@contextmanager
def _unreduced(model: Model) -> Iterator[None]:
    """Inside, gradients stay those of this rank, also where they are reduced beside the backward pass."""
    config = model.config
    names = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func")
    kept = {name: getattr(config, name) for name in names}
    try:
        for name in names:
            setattr(config, name, None)
        with ExitStack() as stack:
            for chunk in model.chunks:
                stack.enter_context(cast(TrainedChunk, chunk).no_sync())
            for chunk in model.gathered_beside:
                gather_no_more(chunk)
            yield
    finally:
        for name, function in kept.items():
            setattr(config, name, function)


def alone(batch: PackedBatch, mesh: Mesh) -> list[PackedBatch]:
    """One micro-batch as a whole pass; interleaved stages take no fewer than there are stages."""
    return [batch] * (mesh.layout.pipeline if mesh.layout.virtual_pipeline else 1)


def gradients_are_finite(model: Model) -> bool:
    """Whether all gradient buffers of this rank are finite."""
    chunks: list[Any] = list(model.chunks)
    buffers = chain.from_iterable((*chunk.buffers, *chunk.expert_parallel_buffers) for chunk in chunks)
    return all(bool(buffer.grad_data.isfinite().all()) for buffer in buffers)


def to_json(batch: PackedBatch, ids: Sequence[str]) -> dict[str, Any]:
    """A micro-batch, and the sample of each of its sequences; `from_json` reads it back bit for bit."""
    owner = dict(zip(batch.sequence.tolist(), batch.fields[SAMPLE].tolist(), strict=True))
    return {
        "samples": [ids[owner[b]] if b in owner else "" for b in range(batch.num_sequences)],
        "max_seqlen": batch.max_seqlen,
        "batch": {name: _numbers(getattr(batch, name)) for name in TENSORS},
        "fields": {name: _numbers(values) for name, values in batch.fields.items()},
        "begins": None if batch.begins is None else _numbers(batch.begins),
        "experts": None if batch.experts is None else routing.to_json(batch.experts.cpu().numpy()),
    }


def from_json(recorded: Mapping[str, Any]) -> PackedBatch:
    """The micro-batch of `to_json`."""
    tensors = {name: _tensor(values) for name, values in recorded["batch"].items()}
    fields = {name: _tensor(values) for name, values in recorded["fields"].items()}
    saved = recorded.get("experts")
    experts = None if saved is None else torch.from_numpy(routing.from_json(saved))
    begins = recorded.get("begins")
    return PackedBatch(
        **tensors,
        max_seqlen=recorded["max_seqlen"],
        fields=fields,
        experts=experts,
        begins=None if begins is None else _tensor(begins),
    )


def _numbers(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "values": tensor.tolist()}


def _tensor(numbers: Mapping[str, Any]) -> Tensor:
    kinds = {str(kind).removeprefix("torch."): kind for kind in _KINDS}
    return torch.tensor(numbers["values"], dtype=kinds[numbers["dtype"]])


_KINDS = (torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16, torch.bool)
