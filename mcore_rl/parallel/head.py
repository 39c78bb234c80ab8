"""The vocab-parallel head: hidden rows x lm_head shard -> log-prob and entropy, never holding the logits.

Every rank of the tensor-parallel group owns the rows [start, start + V_local) of the lm_head. The forward
pass reduces each tile of logits to four numbers per row, exchanges them in ONE all-gather and merges them;
the backward pass recomputes the tiles (recompute mode, four GEMMs in all) and needs one reduction of the
hidden gradient.

Legend: R rows, H hidden, V vocabulary, V_local rows of this rank's shard (padding at the end of the last
shards). With z = logits / temperature, p = softmax(z), entropy = -sum p log p, a = dL/dlog_prob and b =
dL/dentropy:

    dL/dz = a (onehot - p) - b p (log p + entropy)

Source: Megatron-LM's vocab-parallel cross entropy (arXiv 1909.08053, section 3) for the exchange of max and
sum; the entropy term by differentiating -sum p log p.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

TILE_ROWS = 1024
"""Rows of logits alive at once; equal for old, reference and current log-probs: one rounding."""


class HeadOutput(NamedTuple):
    """Per scored row; float32, or float64 when the hidden states are."""

    log_prob: Float[Tensor, " R"]
    """log p(target) at the temperature"""
    entropy: Float[Tensor, " R"]
    """entropy of the full-vocabulary distribution at the temperature, in nats"""

    @property
    def device(self) -> torch.device:
        """Of both; Megatron's schedules ask a model's output for it where the model has experts."""
        return self.log_prob.device


class VocabShard(NamedTuple):
    """Which rows of the vocabulary this rank holds; rows beyond `live` are padding, never multiplied."""

    start: int
    live: int
    group: dist.ProcessGroup | None
    """tensor-parallel group; None where one rank holds the whole vocabulary"""

    @classmethod
    def of(cls, rows: int, vocab_size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """The shard of `rows` lm_head rows that this rank of `group` owns of `vocab_size` tokens."""
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        start = rank * rows
        return cls(start, max(0, min(rows, vocab_size - start)), group if size > 1 else None)


def dense_log_prob_entropy(
    hidden: Float[Tensor, "R H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " R"],
    temperature: float | Float[Tensor, " R"] = 1.0,
) -> HeadOutput:
    """The reference on one rank, for tests: materialises [R, V] logits and leaves the rest to autograd."""
    logits = (hidden @ weight.T) / _column(temperature)
    log_p = torch.log_softmax(logits, dim=-1)
    log_prob = log_p.gather(-1, targets[:, None]).squeeze(-1)
    return HeadOutput(log_prob, -(log_p.exp() * log_p).sum(-1))


def log_prob_entropy(
    hidden: Float[Tensor, "R H"],
    weight: Float[Tensor, "V_local H"],
    targets: Int[Tensor, " R"],
    temperature: float | Float[Tensor, " R"] = 1.0,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    reduce_hidden_grad: bool = True,
    tile_rows: int = TILE_ROWS,
) -> HeadOutput:
    """Log-prob of `targets` and full-vocabulary entropy, vocab-parallel; differentiable in hidden and weight.

    Args:
        hidden: the rows to score, equal on every rank of `group`; row r predicts targets[r].
        weight: this rank's lm_head rows; rows at or beyond `vocab_size` are padding and take no part.
        targets: token ids in [0, vocab_size).
        temperature: of the sampling policy, positive; one number, or one per row.
        group: tensor-parallel group, or None when `weight` is the whole vocabulary.
        vocab_size: tokens without padding; default: all rows of all shards.
        reduce_hidden_grad: sum dL/dhidden over the group in the backward pass. False leaves the partial sums
            to the caller, as sequence parallelism needs (its all-gather reduces by a reduce-scatter).
        tile_rows: rows of logits held at once.

    A weight that Megatron's DDP owns (it has `main_grad`) gets its gradient added there directly; see
    `_weight_grad`.
    """
    ranks = group.size() if group is not None else 1
    shard = VocabShard.of(weight.shape[0], vocab_size or weight.shape[0] * ranks, group)
    return HeadOutput(
        *_VocabParallelHead.apply(hidden, weight, targets, temperature, shard, reduce_hidden_grad, tile_rows)
    )


class _VocabParallelHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, shard, reduce_hidden_grad, tile_rows):
        ctx.set_materialize_grads(False)
        tiles = [
            _shard_statistics(
                _tile_logits(hidden, weight, temperature, shard, rows), targets[rows] - shard.start
            )
            for rows in _tiles(hidden.shape[0], tile_rows)
        ]
        stats = torch.cat(tiles, dim=1) if tiles else hidden.new_zeros(4, 0, dtype=_accumulate_dtype(hidden))
        log_prob, entropy, log_normalizer = merge_statistics(_gather_statistics(stats, shard.group))
        ctx.save_for_backward(hidden, weight, targets, log_normalizer, entropy)
        ctx.temperature, ctx.shard = temperature, shard
        ctx.reduce_hidden_grad, ctx.tile_rows = reduce_hidden_grad, tile_rows
        return log_prob, entropy

    @staticmethod
    def backward(ctx, grad_log_prob, grad_entropy):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, targets, log_normalizer, entropy = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        accumulator = _weight_accumulator(weight) if need_weight else None
        live = weight[: ctx.shard.live]
        for rows in _tiles(hidden.shape[0], ctx.tile_rows):
            dlogits = _grad_logits(
                _tile_logits(hidden, weight, ctx.temperature, ctx.shard, rows).sub_(
                    log_normalizer[rows, None]
                ),
                targets[rows] - ctx.shard.start,
                None if grad_log_prob is None else grad_log_prob[rows],
                None if grad_entropy is None else grad_entropy[rows],
                entropy[rows],
            ).div_(_column(ctx.temperature, rows))
            dlogits = dlogits.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(dlogits, live, out=grad_hidden[rows])
            if accumulator is not None:
                _add_product(accumulator[: ctx.shard.live], dlogits, hidden[rows])
        if grad_hidden is not None and ctx.reduce_hidden_grad and ctx.shard.group is not None:
            dist.all_reduce(grad_hidden, group=ctx.shard.group)
        return grad_hidden, _weight_grad(weight, accumulator), None, None, None, None, None


# --- the maths of one shard ---------------------------------------------------------------------------


def _shard_statistics(z: Float[Tensor, "C V_live"], local: Int[Tensor, " C"]) -> Float[Tensor, "4 C"]:
    """(m, s, u, z_y) of one tile: max, sum e^(z-m), sum e^(z-m) (z-m), target logit or 0 if not owned.

    The max is subtracted BEFORE the product: log s + m - sum p z would cancel at large logits. Consumes `z`.
    """
    rows, live = z.shape
    if live == 0:
        return torch.stack([z.new_full((rows,), -torch.inf), *z.new_zeros(3, rows)])
    owned = (local >= 0) & (local < live)
    target = z.gather(1, local.clamp(0, live - 1)[:, None]).squeeze(1)
    m = z.amax(dim=1)
    z.sub_(m[:, None])
    e = z.exp()
    return torch.stack([m, e.sum(1), e.mul_(z).sum(1), torch.where(owned, target, 0)])


def merge_statistics(stats: Float[Tensor, "ranks 4 R"]) -> tuple[Tensor, Tensor, Tensor]:
    """Merge per-shard (m, s, u, z_y) into (log_prob, entropy, log-normalizer), each [R].

    M = max m_r;  S = sum e^(m_r-M) s_r;  U = sum e^(m_r-M) (u_r + (m_r-M) s_r);  log_prob = z_y - M - log S;
    entropy = log S - U / S. A shard without a live row sends m = -inf, s = u = 0 and is left out: -inf * 0
    is NaN.
    """
    m, s, u, z_y = stats.unbind(1)
    top = m.amax(0)
    shift = torch.where(s > 0, m - top, 0)
    scale = torch.where(s > 0, shift.exp(), 0)
    total = (scale * s).sum(0)
    log_total = total.log()
    entropy = log_total - (scale * (u + shift * s)).sum(0) / total
    return z_y.sum(0) - top - log_total, entropy, top + log_total


def _grad_logits(log_p, local, grad_log_prob, grad_entropy, entropy):
    """dL/dz of one tile [C, V_live] from log p, in place of it: a (onehot - p) - b p (log p + entropy)."""
    live = log_p.shape[1]
    p = log_p.exp()
    if grad_entropy is None:
        grad = p.mul_(-grad_log_prob[:, None])
    else:
        slope = log_p.add_(entropy[:, None]).mul_(grad_entropy[:, None])
        if grad_log_prob is not None:
            slope.add_(grad_log_prob[:, None])
        grad = p.mul_(slope).neg_()
    if grad_log_prob is not None and live > 0:
        owned = (local >= 0) & (local < live)
        grad.scatter_add_(1, local.clamp(0, live - 1)[:, None], torch.where(owned, grad_log_prob, 0)[:, None])
    return grad


# --- tiles, precision, collectives --------------------------------------------------------------------


def _tiles(rows: int, tile_rows: int) -> list[slice]:
    return [slice(start, min(start + tile_rows, rows)) for start in range(0, rows, tile_rows)]


def _column(temperature: float | Tensor, rows: slice | None = None) -> float | Tensor:
    if isinstance(temperature, Tensor) and temperature.ndim == 1:
        return (temperature if rows is None else temperature[rows])[:, None]
    return temperature


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tile_logits(hidden: Tensor, weight: Tensor, temperature, shard: VocabShard, rows: slice) -> Tensor:
    """z = hidden W^T / temperature of one tile [C, V_live]; accumulated in fp32 on CUDA."""
    h, w = hidden[rows], weight[: shard.live]
    if h.is_cuda and h.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(h, w.T, out_dtype=torch.float32)
    else:
        logits = torch.mm(h, w.T).to(_accumulate_dtype(h))
    return logits.div_(_column(temperature, rows))


def _gather_statistics(stats: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[4, R] -> [ranks, 4, R], in one collective; none where R, equal in the group, is 0."""
    if group is None or stats.shape[1] == 0:
        return stats[None]
    gathered = stats.new_empty(group.size() * 4, stats.shape[1])
    dist.all_gather_into_tensor(gathered, stats.contiguous(), group=group)
    return gathered.view(group.size(), 4, -1)


# --- the weight gradient ------------------------------------------------------------------------------


def _weight_accumulator(weight: Tensor) -> Tensor:
    """Where dL/dweight is summed: Megatron's fp32 `main_grad` if DDP owns the weight, else a new buffer."""
    main_grad = getattr(weight, "main_grad", None)
    return torch.zeros_like(weight, dtype=_accumulate_dtype(weight)) if main_grad is None else main_grad


def _add_product(accumulator: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """accumulator += dlogits^T hidden, in the accumulator's precision."""
    if accumulator.dtype == dlogits.dtype:
        accumulator.addmm_(dlogits.T, hidden)
    elif dlogits.is_cuda and accumulator.dtype == torch.float32:
        accumulator.add_(torch.mm(dlogits.T, hidden, out_dtype=torch.float32))
    else:
        accumulator.add_(torch.mm(dlogits.T, hidden))


def _weight_grad(weight: Tensor, accumulator: Tensor | None) -> Tensor | None:
    """What autograd gets for the weight.

    Megatron's contract for a gradient that already lies in `main_grad`: set `grad_added_to_main_grad` and
    return a dummy, so that DDP's hook still fires (never None); zeros where `zero_out_wgrad` says that the
    dummy will be added (tied embeddings: the embedding's own gradient joins it).
    """
    if accumulator is None:
        return None
    if getattr(weight, "main_grad", None) is None:
        return accumulator.to(weight.dtype)
    weight.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
