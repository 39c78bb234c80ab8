"""One optimizer step; where its numbers are not finite, the micro-batch that did it is kept for a replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.algo.metrics import Key
from mcore_rl.checkpoint import Checkpoints, fp8_pieces, model_pieces
from mcore_rl.errors import ConfigError, NumericsError, StorageError
from mcore_rl.model.build import Model
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.model.step import Loss, forward_backward
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout import routing
from mcore_rl.train.metrics import loss_is_finite
from mcore_rl.types import PackedBatch

if TYPE_CHECKING:
    from mcore_rl.train.setup import Trainer

SAMPLE = "sample"
"""field of a row: the number of the sample that it belongs to, in `Update.ids`"""
TENSORS = ("tokens", "position_ids", "cu_seqlens", "rows", "targets", "sequence")


@dataclass(frozen=True)
class Update:
    """What one optimizer step is made of."""

    kind: str
    """`policy`, `critic` or `supervised`: which model, and which objective"""
    step: int
    optimizer: Optimizer
    objective: Loss
    batches: Sequence[PackedBatch]
    """this replica's micro-batches; equally many everywhere"""
    temperature: float
    ids: Sequence[str]
    """of the samples that the rows' field `sample` numbers"""

    @property
    def phase(self) -> str:
        """Whose update it is, in residency.PHASES."""
        return "critic" if self.kind == "critic" else "policy"


def run_update(run: Trainer, update: Update) -> tuple[list[Mapping[Key, Tensor]], float]:
    """The objective's sums of each micro-batch, and the gradient norm.

    Raises:
        NumericsError: on every rank, before any weight changes, when a loss or the gradient is not finite.
            The first micro-batch that does it alone is kept in RUN_DIR/numerics, with the weights.
    """
    with run.residency.during(update.phase):
        return _run_update(run, update)


def _run_update(run: Trainer, update: Update) -> tuple[list[Mapping[Key, Tensor]], float]:
    optimizer = update.optimizer
    optimizer.zero_grad()
    sums = forward_backward(optimizer.model, update.batches, update.objective, update.temperature)
    finite = all(loss_is_finite(one) for one in sums)
    try:
        with run.residency.during(f"{update.phase} step"):
            return sums, optimizer.step(finite=finite)
    except NumericsError as error:
        raised = NumericsError(f"step {update.step}, {update.kind}: {error}. {_dump(run, update)}")
        raise raised.on_every_rank() from error


def _dump(run: Trainer, update: Update) -> str:
    """Find and keep the micro-batch; collective. Says what was found, the same on every rank."""
    mesh = run.mesh
    flags = [_is_broken_alone(update, batch) for batch in update.batches]
    ranks: list[tuple[list[bool], int]] = [([], 0)] * mesh.layout.world_size
    dist.all_gather_object(ranks, (flags, mesh.dp_rank), group=mesh.world)
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
        "align": run.shape.align,
    }
    box: list[Any] = [{**found, **to_json(update.batches[index], update.ids)} if mesh.rank == lead else None]
    dist.broadcast_object_list(box, src=lead, group=mesh.world)
    where = (
        f"micro-batch {index} of replica {replica} on ranks {', '.join(map(str, found['ranks']))}, samples "
        f"{', '.join(box[0]['samples'][:8])}{', ...' if len(box[0]['samples']) > 8 else ''}"
    )
    root = run.config.run.dir / "numerics"
    try:
        _save(run, update, box[0])
    except (StorageError, ConfigError) as error:  # no room, or the directory is not ours
        return f"It begins in {where}; it could not be kept: {error}"
    return f"It begins in {where}; --replay {root / f'step_{update.step}'} shows the value"


def _save(run: Trainer, update: Update, recorded: Mapping[str, Any]) -> None:
    """A checkpoint of the model alone, whose document holds the micro-batch."""
    timeout = run.config.train.step_timeout
    root = run.config.run.dir / "numerics"
    checkpoints = Checkpoints(root, run.mesh, keep=2, background=False, timeout=timeout)
    with checkpoints.open():
        document = {"config": run.config.model_dump(mode="json"), "numerics": recorded}
        model = update.optimizer.model
        checkpoints.save(update.step, [*model_pieces(model), *fp8_pieces(model)], document)


def _is_broken_alone(update: Update, batch: PackedBatch) -> bool:
    """A loss or gradient of this micro-batch is not finite on THIS rank: nothing is reduced over replicas."""
    model = update.optimizer.model
    update.optimizer.zero_grad()
    reduce, model.config.finalize_model_grads_func = model.config.finalize_model_grads_func, None
    try:
        sums = forward_backward(model, alone(batch, model.mesh), update.objective, update.temperature)
    finally:
        model.config.finalize_model_grads_func = reduce
    return not (all(loss_is_finite(one) for one in sums) and gradients_are_finite(model))


def alone(batch: PackedBatch, mesh: Mesh) -> list[PackedBatch]:
    """One micro-batch as a whole pass; interleaved stages take no fewer than there are stages."""
    return [batch] * (mesh.layout.pipeline if mesh.layout.virtual_pipeline else 1)


def gradients_are_finite(model: Model) -> bool:
    """Of all gradient buffers of this rank."""
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
        "experts": None if batch.experts is None else routing.to_json(batch.experts.cpu().numpy()),
    }


def from_json(recorded: Mapping[str, Any]) -> PackedBatch:
    """The micro-batch of `to_json`."""
    tensors = {name: _tensor(values) for name, values in recorded["batch"].items()}
    fields = {name: _tensor(values) for name, values in recorded["fields"].items()}
    saved = recorded.get("experts")
    experts = None if saved is None else torch.from_numpy(routing.from_json(saved))
    return PackedBatch(**tensors, max_seqlen=recorded["max_seqlen"], fields=fields, experts=experts)


def _numbers(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "values": tensor.tolist()}


def _tensor(numbers: Mapping[str, Any]) -> Tensor:
    kinds = {str(kind).removeprefix("torch."): kind for kind in _KINDS}
    return torch.tensor(numbers["values"], dtype=kinds[numbers["dtype"]])


_KINDS = (torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16, torch.bool)
