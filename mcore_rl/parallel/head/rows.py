"""The row kernels in torch: four statistics of each row of logits, and the gradient in its logits.

On a CPU they go through blocks of rows that fit its cache; a GPU gets them whole.

Legend: C rows of one tile, L live vocabulary rows of this rank's shard. With logits l, temperature t, M the
largest logit of the whole row and S = sum e^((l - M) / t) over the whole vocabulary:

    log p = (l - M) / t - log S

Where the model caps its logits, l is cap tanh(l' / cap) of the products l' that the GEMM gives: the kernels
get those, and give the gradient in them, dL/dl' = dL/dl (1 - (l / cap)^2).

The maximum is subtracted first, from the logits as they are: what is left is small and exact, however large
the logits were.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

LN_2 = math.log(2)
BLOCK_ELEMENTS = 1 << 17
"""elements of a block on a CPU: two of them in float32 fill the second-level cache of a core"""


class RowTerms(NamedTuple):
    """What the gradient of a row needs to know of the whole vocabulary and of the loss."""

    top: Float[Tensor, " C"]
    """M"""
    log_total: Float[Tensor, " C"]
    """log S"""
    entropy: Float[Tensor, " C"]
    """-sum p log p"""
    grad_log_prob: Float[Tensor, " C"]
    """dL/dlog p(target)"""
    grad_entropy: Float[Tensor, " C"] | None
    """dL/dentropy; None where the loss does not depend on it"""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of statistics and sums over values of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def shard_statistics(
    logits: Float[Tensor, "C L"], local: Int[Tensor, " C"], scale: float, cap: float | None = None
) -> Float[Tensor, "4 C"]:
    """(m, s, u, l_y) of each row: max l, sum e^z, sum z e^z with z = scale (l - m), target logit if owned.

    m and l_y are logits before the temperature; l_y is 0 where `local` lies outside the shard. The max is
    subtracted BEFORE the product: log s + m - sum p l would cancel at large logits. A shard without an
    entry has m = -inf, s = u = 0.
    """
    rows, live = logits.shape
    stats = logits.new_empty(4, rows, dtype=accumulate_dtype(logits.dtype))
    if live == 0:
        stats.zero_()[0] = -torch.inf
        return stats
    z, e = _scratch(logits)
    for block in _blocks(logits):
        _block_statistics(logits[block], scale, cap, z, e, stats[:, block])
    owned = (local >= 0) & (local < live)
    target = logits.gather(1, local.clamp(0, live - 1)[:, None]).squeeze(1).to(stats.dtype)
    stats[3] = torch.where(owned, target if cap is None else capped_(target, cap), 0)
    return stats


def logit_gradient(
    logits: Float[Tensor, "C L"],
    local: Int[Tensor, " C"],
    terms: RowTerms,
    scale: float,
    out: Float[Tensor, "C L"],
    cap: float | None = None,
) -> None:
    """out = dL/dlogits = scale (a (onehot - p) - b p (log p + entropy)); `out` may be `logits` itself.

    a and b are the loss's derivatives in log-prob and entropy, and `scale` is 1 / temperature.
    """
    live = logits.shape[1]
    if live == 0:
        return
    a, level, slope = coefficients(terms, scale)
    place = local.clamp(0, live - 1)[:, None]
    at_target = torch.where((local >= 0) & (local < live), a, 0)[:, None]
    z, e = _scratch(logits)
    for block in _blocks(logits):
        n = block.stop - block.start
        steepness = None
        if cap is None:
            torch.sub(logits[block], terms.top[block, None], out=z[:n])
        else:
            steepness = cap_slope(capped_(z[:n].copy_(logits[block]), cap), cap)
            z[:n].sub_(terms.top[block, None])
        grad = _block_gradient(
            z[:n],
            e[:n],
            scale,
            terms.log_total[block, None],
            level[block, None],
            None if slope is None else slope[block, None],
        )
        grad.scatter_add_(1, place[block], at_target[block])
        out[block] = grad if steepness is None else grad.mul_(steepness)


def coefficients(
    terms: RowTerms, scale: float
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"], Float[Tensor, " C"] | None]:
    """(a, level, slope) of dL/dlogits = a onehot + p (level + slope log p)."""
    a = terms.grad_log_prob * scale
    if terms.grad_entropy is None:
        return a, -a, None
    slope = -terms.grad_entropy * scale
    return a, slope * terms.entropy - a, slope


def merge_statistics(
    stats: Float[Tensor, "ranks 4 C"], scale: float
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"], Float[Tensor, " C"], Float[Tensor, " C"]]:
    """(log_prob, entropy, M, log S) of whole rows, each [C], from the statistics of all their parts.

    log_prob = scale (l_y - M) - log S;  entropy = log S - U / S.
    """
    top, total, weighted, target = combined(stats, scale)
    log_total = total.log()
    return (target - top) * scale - log_total, log_total - weighted / total, top, log_total


def combined(stats: Float[Tensor, "parts 4 C"], scale: float) -> Float[Tensor, "4 C"]:
    """The statistics of rows from those of their parts: shards, or blocks of columns of one.

    M = max m_r;  d_r = scale (m_r - M);  S = sum e^d_r s_r;  U = sum e^d_r (u_r + d_r s_r). A part without a
    live entry has m = -inf, s = u = 0 and is left out: -inf * 0 is NaN.
    """
    if len(stats) == 1:
        return stats[0]
    m, s, u, target = stats.unbind(1)
    top = m.amax(0)
    shift = torch.where(s > 0, (m - top) * scale, 0)
    weight = torch.where(s > 0, shift.exp(), 0)
    weighted = (weight * (u + shift * s)).sum(0)
    return torch.stack([top, (weight * s).sum(0), weighted, target.sum(0)])


def capped_(logits: Tensor, cap: float) -> Tensor:
    """cap tanh(logits / cap), in the place of the logits."""
    return logits.div_(cap).tanh_().mul_(cap)


def cap_slope(capped: Tensor, cap: float) -> Tensor:
    """The derivative of capped logits in those before the cap; a new tensor."""
    return capped.div(cap).square_().neg_().add_(1)


def _block_statistics(logits, scale, cap, z, e, stats) -> None:
    """Write m, s and u of a few rows to `stats` [4, rows]; z and e are room for them."""
    z, e = z[: len(logits)], e[: len(logits)]
    if cap is not None:
        logits = capped_(z.copy_(logits), cap)
    elif logits.dtype != z.dtype:
        logits = z.copy_(logits)
    torch.amax(logits, 1, out=stats[0])
    torch.sub(logits, stats[0, :, None], out=z)
    _to_powers_of_two(z, scale)
    torch.exp2(z, out=e)
    torch.sum(e, 1, out=stats[1])
    torch.sum(e.mul_(z), 1, out=stats[2])
    stats[2].mul_(LN_2)


def _block_gradient(z, e, scale, log_total, level, slope) -> Tensor:
    """p (level + slope log p) of z = l - M, in one of the two given rooms."""
    _to_powers_of_two(z, scale).sub_(log_total / LN_2)
    if slope is None:
        return z.exp2_().mul_(level)
    torch.exp2(z, out=e)
    return z.mul_(slope * LN_2).add_(level).mul_(e)


def _to_powers_of_two(z: Tensor, scale: float) -> Tensor:
    """z such that 2^z is e^(scale z): torch's exp2 costs less than half of its exp on a CPU."""
    return z.mul_(scale / LN_2)


def _block_rows(logits: Tensor) -> int:
    rows, width = logits.shape
    return max(1, BLOCK_ELEMENTS // width) if logits.device.type == "cpu" else max(1, rows)


def _blocks(logits: Tensor) -> list[slice]:
    rows, step = logits.shape[0], _block_rows(logits)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _scratch(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Two blocks, made once: memory that is new at every block costs more in page faults than the maths."""
    shape = (min(_block_rows(logits), logits.shape[0]), logits.shape[1])
    dtype = accumulate_dtype(logits.dtype)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=dtype)
