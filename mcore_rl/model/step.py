"""One pass of micro-batches through Megatron's own schedules: forward to score, then backward for a loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import tee
from typing import Any, Protocol, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mcore_rl.model import platform
from mcore_rl.model.build import Model
from mcore_rl.model.packed_layout import PackedLayout, of_like_lengths
from mcore_rl.model.policy import Scored
from mcore_rl.parallel.context import local_tokens
from mcore_rl.parallel.head import HeadOutput, RowLoss
from mcore_rl.parallel.head.divergence import Against
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.types import PackedBatch

T = TypeVar("T")

Measure = Callable[[], Mapping[Any, Tensor]]
"""what a loss measured, by whatever keys; it may be left uncalled"""


class Loss(Protocol):
    """The sum over rows of weight * loss. Weights carry 1 / global count, so that nobody divides again."""

    def __call__(self, batch: PackedBatch, output: Any, /) -> tuple[Tensor, Measure]:
        """(this rank's rows of a micro-batch; on them a HeadOutput, or a critic's values or divergences [R]).

        Returns the sum of w * l over those rows, and what measures it; that is called once for every
        micro-batch, with all of its rows, however often a part of them was asked.
        """
        ...

    def rowwise(self, batch: PackedBatch, /) -> bool:
        """A policy's loss of which any part of `batch`'s rows can be asked alone.

        The head then asks it while it has the logits (`parallel.head.head_loss`, three GEMMs); else it
        computes them twice (`log_prob_entropy`, four). Equal on every rank of a tensor-parallel group.
        """
        ...


@dataclass(frozen=True)
class LocalBatch:
    """A micro-batch as this rank sees it: its context-parallel share, on its device."""

    packed: PackedBatch
    """tokens, rows and fields of this rank; `rows` index its own tokens, `cu_seqlens` its own boundaries"""
    layout: PackedLayout


def forward(
    model: Model,
    batches: Sequence[PackedBatch],
    temperature: float,
    *,
    against: Sequence[Against | None] = (),
    states: bool = False,
) -> list[tuple[PackedBatch, Any]]:
    """Score every row, no gradient.

    Args:
        temperature: of a policy's log-probs; a critic ignores it.
        against: per micro-batch, what a student is compared with; without it, log-probs are asked.
        states: a policy's last hidden states are asked instead.

    Returns, per micro-batch, this rank's rows and a policy's HeadOutput, a student's divergences or a
    critic's values [R] (or hidden states [T_local, H]) on the last pipeline stage, nothing elsewhere. Under
    context parallelism every rank has other rows: a field tells them apart.
    """

    def collector(batch: LocalBatch):
        def collect(output, non_loss_data: bool = False) -> tuple[PackedBatch, HeadOutput | Tensor]:
            return batch.packed, _output(output)

        return None, collect

    asked = _Asked(temperature, against, states)
    with torch.no_grad():
        return _run(model, batches, asked, collector, forward_only=True, collect_non_loss_data=True)


def forward_backward(
    model: Model,
    batches: Sequence[PackedBatch],
    loss: Loss,
    temperature: float,
    *,
    against: Sequence[Against | None] = (),
) -> list[Mapping[Any, Tensor]]:
    """Add the gradient of sum(w * l) over all micro-batches and ranks to Megatron's gradient buffers.

    Every rank must pass the same number of micro-batches. The gradient buffers must have been zeroed. After
    the call the gradients are reduced over data-parallel ranks, as Megatron's optimizer expects them.

    Args:
        against: per micro-batch, what a student is compared with; a row-wise loss is then told divergences.

    Returns what `loss` measured of every micro-batch, on the last pipeline stage, nothing elsewhere.
    """
    scale = loss_scale(len(batches), model.mesh)

    def of_batch(batch: LocalBatch):
        if not loss.rowwise(batch.packed):
            return None, partial(_scaled_loss, loss, batch.packed, scale)
        in_parts = _InParts(loss, batch.packed)
        return in_parts, partial(_scaled_head_loss, in_parts.metrics, scale)

    calls = _run(model, batches, _Asked(temperature, against), of_batch, forward_only=False)
    return [metrics for of_one in calls for metrics in of_one]


class _InParts:
    """A row-wise loss as the head asks it: by some rows of a micro-batch at a time, in order.

    It is measured once, of all rows, when the last of them have been asked: measured by parts, every part
    would launch as many kernels as the whole.
    """

    def __init__(self, loss: Loss, batch: PackedBatch) -> None:
        self.loss, self.batch = loss, batch
        self.metrics: list[Mapping[Any, Tensor]] = []
        """what was measured; the backward pass fills it"""
        self._asked: list[Any] = []

    def __call__(self, rows: slice, head: Any) -> Tensor:
        count = len(self.batch.rows)
        total, measure = self.loss(_some_rows(self.batch, rows), head)
        if rows.stop == count:
            if self._asked:
                measure = self.loss(self.batch, _joined([*self._asked, head]))[1]
            self.metrics.append({name: value.detach() for name, value in measure().items()})
        self._asked.append(head)
        return total


def _joined(heads: Sequence[Any]) -> Any:
    """What the head said of parts of a micro-batch, as of all its rows; leaves, as the parts are."""
    if isinstance(heads[0], Tensor):
        return torch.cat([head.detach() for head in heads]).requires_grad_()
    return HeadOutput(
        *(torch.cat([x.detach() for x in part]).requires_grad_() for part in zip(*heads, strict=True))
    )


def _some_rows(batch: PackedBatch, rows: slice) -> PackedBatch:
    return replace(
        batch,
        rows=batch.rows[rows],
        targets=batch.targets[rows],
        sequence=batch.sequence[rows],
        fields={name: value[rows] for name, value in batch.fields.items()},
    )


def loss_scale(num_microbatches: int, mesh: Mesh) -> int:
    """What undoes Megatron's averaging: its schedule divides by the micro-batches M, its DDP by DP x CP."""
    return num_microbatches * mesh.layout.data * mesh.layout.context


_ONE = torch.tensor(1)
"""the number of tokens that the schedule is told of; on the host, once"""


def _output(output) -> HeadOutput | Tensor:
    """What the last stage answered; Megatron's bf16 wrapper turns named tuples into plain ones."""
    return output if isinstance(output, Tensor) else HeadOutput(*output)


def _scaled_loss(loss: Loss, batch: PackedBatch, scale: int, output):
    total, measure = loss(batch, _output(output))
    metrics = {name: value.detach().clone() for name, value in measure().items()}
    # Token count 1: with `calculate_per_token_loss` off, the schedule divides by max(count, 1) and by M only.
    # It divides in place: metrics must not alias the loss.
    return total * scale, _ONE, [metrics]


def _scaled_head_loss(metrics: list, scale: int, output: Tensor):
    """Scale the head's own scalar, and with it the gradient that it will receive."""
    return output * scale, _ONE, metrics


OfBatch = Callable[[LocalBatch], tuple[RowLoss | None, Callable]]
"""micro-batch -> (what the head asks, if the loss is row-wise; what the schedule calls with its answer)"""


@dataclass(frozen=True)
class _Asked:
    """What the last stage is asked of every micro-batch, besides its rows."""

    temperature: float
    against: Sequence[Against | None] = ()
    """one for each micro-batch, or none at all"""
    states: bool = False


def _run(model: Model, batches, asked: _Asked, of_batch: OfBatch, **schedule):
    local = [localize(batch, model.mesh, platform.device()) for batch in batches]
    pairs = deque(zip(local, asked.against or [None] * len(local), strict=True))
    count, hint = len(local), local[0].packed.tokens.numel()
    del local  # a micro-batch, and what attention makes for it, goes when it has been through

    def step(iterator, chunk):
        batch, against = next(iterator)
        packed = batch.packed
        row_loss, loss_function = of_batch(batch)
        scored = Scored(packed.rows, packed.targets, asked.temperature, row_loss, against, asked.states)
        output = chunk(
            packed.tokens[None],
            packed.position_ids[None],
            None,
            labels=scored,
            packed_seq_params=batch.layout,
        )
        return _output(output), loss_function

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=list(tee(_taken(pairs), len(model.chunks))),
        model=list(model.chunks),
        num_microbatches=count,
        seq_length=hint,  # lengths vary and are exchanged by the stages
        micro_batch_size=1,
        **schedule,
    )


def _taken(pairs: deque[T]) -> Iterator[T]:
    while pairs:
        yield pairs.popleft()


def localize(batch: PackedBatch, mesh: Mesh, device: torch.device) -> LocalBatch:
    """This context-parallel rank's share of a micro-batch, on its way to `device`: nobody waits for it."""
    size = mesh.layout.context
    on_host = device.type == "cpu"
    packed = _to(batch if size == 1 else _share(batch, size, mesh.cp_rank), device)
    boundaries = packed.cu_seqlens if size == 1 else _sent(batch.cu_seqlens, device)
    experts = _of_routers(packed.experts, mesh)
    layout = PackedLayout.of(
        packed.position_ids,
        boundaries,
        batch.max_seqlen,
        context=size,
        experts=experts,
        begins=packed.begins,
        # A device that computes beside the host gets one part: its indices would be copied there.
        parts=of_like_lengths(batch.cu_seqlens, batch.position_ids) if size == 1 and on_host else None,
    )
    layout.live = _of_routers(packed.live, mesh)
    return LocalBatch(packed, layout)


def _share(batch: PackedBatch, size: int, rank: int) -> PackedBatch:
    """The tokens and rows of one of `size` context-parallel ranks."""
    mine = local_tokens(batch.cu_seqlens, size, rank)
    position = torch.full((batch.tokens.numel(),), -1, dtype=torch.int64)
    position[mine] = torch.arange(mine.numel())
    owned = position[batch.rows] >= 0
    return replace(
        batch,
        tokens=batch.tokens[mine],
        position_ids=batch.position_ids[mine],
        cu_seqlens=batch.cu_seqlens // size,
        rows=position[batch.rows[owned]],
        targets=batch.targets[owned],
        sequence=batch.sequence[owned],
        fields={name: value[owned] for name, value in batch.fields.items()},
        experts=None if batch.experts is None else batch.experts[mine],
        live=None if batch.live is None else batch.live[mine],
    )


def _of_routers(tokens: Tensor | None, mesh: Mesh) -> Tensor | None:
    """[T, ...] of the tokens whose states this rank's routers see: a part, under sequence parallelism."""
    if tokens is None or not mesh.layout.sequence:
        return tokens
    return tokens.chunk(mesh.layout.tensor)[mesh.tp_rank]


def _to(batch: PackedBatch, device: torch.device) -> PackedBatch:
    if device.type == "cpu":
        return batch
    moved = {
        name: _sent(getattr(batch, name), device)
        for name in ("tokens", "position_ids", "cu_seqlens", "rows", "targets", "sequence")
    }
    experts = None if batch.experts is None else _sent(batch.experts, device)
    live = None if batch.live is None else _sent(batch.live, device)
    begins = None if batch.begins is None else _sent(batch.begins, device)
    fields = {name: _sent(value, device) for name, value in batch.fields.items()}
    return replace(batch, **moved, fields=fields, experts=experts, live=live, begins=begins)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that is still under way: pinned memory is read by the device on its own."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
