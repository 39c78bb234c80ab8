"""The passes of the head over its rows: statistics, and the gradient in hidden states and weight.

Legend: R rows, H hidden, V_local rows of this rank's lm_head shard.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.parallel.head.rows import accumulate_dtype, combined

MIB = 1 << 20
MAX_ROWS = 1024


class Tiling(NamedTuple):
    """Row counts, the second a multiple of the first (the last ones may be cut short), and columns."""

    tile: int
    """rows of one GEMM for logits; the same in every pass, so that old and current log-probs round alike"""
    wave: int
    """whose logits are alive between their statistics and their gradient, of which a loss is asked at once,
    and that have one GEMM each for the gradient in hidden states and weight"""
    columns: int
    """vocabulary rows of one GEMM for logits, the same in every pass as well"""
    apart: bool = False
    """the gradient in the logits lies beside them and does not take their place, so that a wave's statistics
    are exchanged while the GEMMs of the wave before it run"""

    @classmethod
    def of(cls, vocab_rows: int, dtype: torch.dtype, device: torch.device) -> Tiling:
        """For `vocab_rows` lm_head rows per rank, padding included: the same on every rank of a group.

        On a CPU logits have the dtype of the GEMM and their gradient takes their place: 64 MiB of them to
        differentiate, 16 to score. Rows are what a GEMM wants more of, since each tile of rows reads the
        whole weight again, so logits are cut along the vocabulary as well.
        On a GPU 16-bit inputs give fp32 logits, at most 320 MiB of them, and 16-bit gradients, half of that:
        4096 rows of 16032 (a 128256-token vocabulary on 8 ranks) take 250 and 125 MiB. A wave has as many
        rows as fit, up to four tiles: what a wave launches besides its GEMMs is the same for any number.
        """
        if device.type == "cpu":
            rows = _rows(64 * MIB, vocab_rows * dtype.itemsize)
            return cls(rows, rows, 16 * MIB // (rows * dtype.itemsize))
        row_bytes = vocab_rows * accumulate_dtype(dtype).itemsize
        tile = _rows(320 * MIB, row_bytes)
        if in_place(dtype, device):
            return cls(tile, tile, vocab_rows)
        fitting = 320 * MIB // row_bytes // tile
        return cls(tile, tile * max(1, min(4, fitting)), vocab_rows, apart=True)


def in_place(dtype: torch.dtype, device: torch.device) -> bool:
    """The GEMM for logits answers in the dtype of its inputs, so that their gradient can take their place."""
    return device.type == "cpu" or accumulate_dtype(dtype) == dtype


def parts(rows: slice, size: int) -> list[slice]:
    """`rows` cut into slices of `size`."""
    return [slice(a, min(a + size, rows.stop)) for a in range(rows.start, rows.stop, size)]


def _rows(bound: int, row_bytes: int) -> int:
    """The largest power of two that keeps within `bound`, from 16 to MAX_ROWS."""
    fitting = max(16, bound // row_bytes)
    return min(MAX_ROWS, 1 << (fitting.bit_length() - 1))


PRODUCT_ELEMENTS = 1 << 20
"""elements of dW added at once where its GEMM does not answer in the accumulator's precision"""


class VocabShard(NamedTuple):
    """Which rows of the vocabulary this rank holds; rows beyond `live` are padding, never multiplied."""

    start: int
    live: int
    group: dist.ProcessGroup | None
    """tensor-parallel group; None where one rank holds the whole vocabulary"""

    @classmethod
    def of(cls, rows: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> VocabShard:
        """The shard of `rows` lm_head rows that this rank of `group` owns of `vocab_size` tokens."""
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        start = rank * rows
        live = max(0, min(rows, (vocab_size or rows * size) - start))
        return cls(start, live, group if size > 1 else None)


class Call(NamedTuple):
    """What one call of the head is told, besides the tensors that have gradients."""

    targets: Tensor
    """[R]"""
    scale: float
    """1 / temperature"""
    rows: Tensor | None
    """[R] which hidden states are scored; None: all, in order"""
    shard: VocabShard
    sequence_parallel: bool
    """hidden states are split over the group"""
    tiling: Tiling
    cap: float | None = None
    """the model's logits are cap tanh(l / cap) of the products l; None where they are the products"""

    @classmethod
    def of(
        cls,
        weight: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        *,
        rows: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        vocab_size: int | None = None,
        sequence_parallel: bool = False,
        tiling: Tiling | None = None,
        cap: float | None = None,
    ) -> Call:
        """A call that scores `targets` with the lm_head shard `weight`.

        Args:
            weight: [V_local, H] rows at or beyond `vocab_size` are padding and take no part.
            targets: [R] token ids in [0, vocab_size).
            temperature: the sampling policy's, positive.
            rows: [R] targets[r] is scored from hidden state rows[r] of all T; default: from the r-th.
            group: tensor-parallel group, or None when `weight` is the whole vocabulary.
            vocab_size: tokens without padding; default: all rows of all shards.
            sequence_parallel: hidden states are gathered over the group, their gradient reduce-scattered.
            tiling: rows worked on at once; default: by size, dtype and device.
            cap: the model's bound of its logits, before the temperature; positive.
        """
        shard = VocabShard.of(weight.shape[0], vocab_size, group)
        tiling = tiling or Tiling.of(weight.shape[0], weight.dtype, weight.device)
        return cls(targets, 1.0 / temperature, rows, shard, sequence_parallel, tiling, cap)

    def local(self, rows: slice) -> Tensor:
        """The targets of some rows, as rows of this shard."""
        return self.targets[rows] - self.shard.start


# --- hidden states --------------------------------------------------------------------------------------


def scored_hidden(hidden: Tensor, call: Call) -> Tensor:
    """[T or T/ranks, H] -> [R, H]: gathered over the group under sequence parallelism, then picked."""
    if call.sequence_parallel and call.shard.group is not None:
        group = call.shard.group
        whole = hidden.new_empty(hidden.shape[0] * group.size(), hidden.shape[1])
        dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
        hidden = whole
    return hidden if call.rows is None else hidden.index_select(0, call.rows)


def begin_reduction(grad_rows: Tensor, tokens: int, call: Call) -> Callable[[], Tensor]:
    """Start to sum the gradient [R, H] over the group; the answer waits for this rank's [tokens, H]."""
    group = call.shard.group
    if group is None or grad_rows.shape[0] == 0:
        return lambda: _placed(grad_rows, tokens, call.rows)
    if call.sequence_parallel:
        whole = _placed(grad_rows, tokens * group.size(), call.rows)
        result = whole.new_empty(tokens, whole.shape[1])
        work = dist.reduce_scatter_tensor(result, whole, group=group, async_op=True)
    else:
        whole = result = grad_rows
        work = dist.all_reduce(whole, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()  # type: ignore[union-attr]  # async_op gives a handle
        return result if call.sequence_parallel else _placed(whole, tokens, call.rows)

    return finish


def _placed(grad_rows: Tensor, tokens: int, rows: Tensor | None) -> Tensor:
    """[R, H] -> [tokens, H], 0 where no row was picked."""
    if rows is None:
        return grad_rows
    return grad_rows.new_zeros(tokens, grad_rows.shape[1]).index_add_(0, rows, grad_rows)


# --- passes ---------------------------------------------------------------------------------------------


def statistics(hidden: Tensor, weight: Tensor, call: Call) -> Tensor:
    """[4, R] of this shard; holds one tile of logits."""
    stats = hidden.new_zeros(4, len(hidden), dtype=accumulate_dtype(hidden.dtype))
    live = weight[: call.shard.live]
    room = _room(hidden, min(call.tiling.tile, len(hidden)), min(call.tiling.columns, len(live)))
    for tile in parts(slice(0, len(hidden)), call.tiling.tile):

        def logits(columns: slice, tile: slice = tile) -> Tensor:
            width = columns.stop - columns.start
            return _logits(hidden[tile], live[columns], room[: tile.stop - tile.start, :width])

        stats[:, tile] = _row_statistics(logits, call, tile)
    return stats


def statistics_of(logits: Tensor, call: Call, rows: slice) -> Tensor:
    """[4, C] of this shard's logits [C, live] of `rows`, bit by bit those of `statistics`."""
    return _row_statistics(lambda columns: logits[:, columns], call, rows)


def _row_statistics(logits_of: Callable[[slice], Tensor], call: Call, rows: slice) -> Tensor:
    """By blocks of columns, each asked for once and not kept."""
    found = []
    for columns in parts(slice(0, call.shard.live), call.tiling.columns) or [slice(0, 0)]:
        local, logits = call.local(rows) - columns.start, logits_of(columns)
        kernels = row_kernels(logits.device, logits.dtype)
        found.append(kernels.shard_statistics(logits, local, call.scale, call.cap))
    return combined(torch.stack(found), call.scale) if len(found) > 1 else found[0]


Differentiate = Callable[[slice, Tensor], Callable[[Tensor], None]]


def gradients(
    hidden: Tensor,
    weight: Tensor,
    call: Call,
    differentiate: Differentiate,
    begin: Callable[[Tensor], Callable[[], Tensor]] | None,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(what `begin` reduces, where the weight's gradient was summed), from one more GEMM for logits and two.

    Args:
        hidden: [R, H] scored rows.
        differentiate: (rows, their logits) begins what other ranks take part in and returns what writes
            dL/dlogits of the rows, once, into a room that may be the logits' own; called for each wave, in
            order.
        begin: starts the reduction of dL/dhidden [R, H], which runs beside the last GEMM for the weight; None
            where no gradient in the hidden states is wanted.
    """
    live, tiling = weight[: call.shard.live], call.tiling
    grad_hidden = None if begin is None else torch.empty_like(hidden)
    finish = None if begin is None or len(hidden) else begin(hidden)
    accumulator = _weight_accumulator(weight) if need_weight else None
    everything = slice(0, len(hidden))
    room = hidden.new_empty(min(tiling.wave, len(hidden)), len(live))
    apart = _room(hidden, len(room), len(live)) if tiling.apart else room

    def multiply(wave: slice) -> None:
        nonlocal finish
        dlogits = room[: wave.stop - wave.start]
        if grad_hidden is not None and begin is not None:
            torch.mm(dlogits, live, out=grad_hidden[wave])
            finish = begin(grad_hidden) if wave.stop == everything.stop else finish
        if accumulator is not None:
            _add_product(accumulator[: len(live)], dlogits, hidden[wave])

    before = None
    for wave in parts(everything, tiling.wave):
        logits = apart[: wave.stop - wave.start]
        _write_logits(hidden, live, call, wave, logits)
        write = differentiate(wave, logits)
        if before is not None and tiling.apart:
            multiply(before)
        write(room[: len(logits)])
        if not tiling.apart:
            multiply(wave)
        before = wave
    if before is not None and tiling.apart:
        multiply(before)
    return (None if finish is None else finish()), accumulator


def logits_of(hidden: Tensor, live: Tensor, call: Call, rows: slice) -> Tensor:
    """Logits [C, live] of some scored rows, before the temperature, in memory of their own."""
    logits = _room(hidden, rows.stop - rows.start, len(live))
    _write_logits(hidden, live, call, rows, logits)
    return logits


def _write_logits(hidden: Tensor, live: Tensor, call: Call, rows: slice, out: Tensor) -> None:
    """Write the logits of some rows by the tiles and columns of every pass, so that they round alike."""
    for tile in parts(rows, call.tiling.tile):
        place = out[tile.start - rows.start : tile.stop - rows.start]
        for columns in parts(slice(0, len(live)), call.tiling.columns):
            _logits(hidden[tile], live[columns], place[:, columns])


# --- GEMMs and collectives ------------------------------------------------------------------------------


def _room(hidden: Tensor, rows: int, width: int) -> Tensor:
    dtype = hidden.dtype if in_place(hidden.dtype, hidden.device) else accumulate_dtype(hidden.dtype)
    return hidden.new_empty(rows, width, dtype=dtype)


def _logits(hidden: Tensor, live: Tensor, out: Tensor) -> Tensor:
    """hidden W^T, before the temperature, into `out`; accumulated and kept in fp32 on CUDA."""
    if out.dtype == hidden.dtype:
        return torch.mm(hidden, live.T, out=out)
    return torch.mm(hidden, live.T, out.dtype, out=out)


def gather_statistics(stats: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[S, C] -> [ranks, S, C], in one collective; none where C, equal in the group, is 0."""
    return begin_gather(stats, group)()


def begin_gather(stats: Tensor, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """Start `gather_statistics`; the answer waits for it."""
    if group is None or stats.shape[1] == 0:
        return lambda: stats[None]
    gathered = stats.new_empty(group.size() * len(stats), stats.shape[1])
    work = dist.all_gather_into_tensor(gathered, stats.contiguous(), group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()  # type: ignore[union-attr]  # async_op gives a handle
        return gathered.view(group.size(), len(stats), -1)

    return finish


def _weight_accumulator(weight: Tensor) -> Tensor:
    """Where dL/dweight is summed: Megatron's fp32 `main_grad` if DDP owns the weight, else a new buffer."""
    main_grad = getattr(weight, "main_grad", None)
    return torch.zeros_like(weight, dtype=accumulate_dtype(weight.dtype)) if main_grad is None else main_grad


def _add_product(accumulator: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """accumulator += dlogits^T hidden, in the accumulator's precision."""
    if accumulator.dtype == dlogits.dtype:
        accumulator.addmm_(dlogits.T, hidden)
        return
    if hidden.is_cuda:
        torch.addmm(accumulator, dlogits.T, hidden, out_dtype=accumulator.dtype, out=accumulator)
        return
    for some in parts(slice(0, len(accumulator)), max(1, PRODUCT_ELEMENTS // hidden.shape[1])):
        accumulator[some].add_(torch.mm(dlogits[:, some].T, hidden))


def weight_grad(weight: Tensor, accumulator: Tensor | None) -> Tensor | None:
    """What autograd gets for the weight; asked for when the logits are gone, as it has the weight's size.

    Megatron's contract for a gradient that already lies in `main_grad`: set `grad_added_to_main_grad` and
    return a dummy, so that DDP's hook still fires (never None); zeros where `zero_out_wgrad` says that the
    dummy will be added (tied embeddings: the embedding's own gradient joins it). It waits for that gradient
    through the whole backward pass, and has the memory of one zero.
    """
    if accumulator is None:
        return None
    if getattr(weight, "main_grad", None) is None:
        return accumulator.to(weight.dtype)
    weight.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
    if getattr(weight, "zero_out_wgrad", False):
        return weight.new_zeros(()).expand_as(weight)
    return torch.empty_like(weight)


@cache
def row_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module for logits of that kind: Triton's on a GPU, where it is installed; else torch's.

    Both have `shard_statistics` and `logit_gradient`. Triton is asked for only here, so that nothing imports
    it on a CPU; it computes in float32, so that float64 is torch's on a GPU, too.
    """
    on_gpu = device.type == "cuda" and dtype != torch.float64 and find_spec("triton") is not None
    return import_module(f"{__package__}.{'triton_rows' if on_gpu else 'rows'}")
