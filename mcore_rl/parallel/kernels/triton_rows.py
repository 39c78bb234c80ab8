"""The row kernels in Triton: each reads a row of logits once, in float32, and holds one block of it.

Interface, legend and formulas are those of `rows`, its reference. No atomics: the same bits at every run.
Kernels are `no_type_check`: Triton reads their source, so that nothing may wrap them.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mcore_rl.parallel.kernels.rows import RowTerms, Scale, coefficients

BLOCK = 4096
"""columns in registers at once: 16 a thread"""
WARPS = 8
LN_2 = tl.constexpr(math.log(2))


def shard_statistics(
    logits: Float[Tensor, "C L"], local: Int[Tensor, " C"], scale: Scale, keep: Bool[Tensor, "C L"] | None
) -> Float[Tensor, "4 C"]:
    """As `rows.shard_statistics`."""
    rows, live = logits.shape
    stats = logits.new_empty(4, rows, dtype=torch.float32)
    if rows:
        _statistics[(rows,)](
            stats, *_matrix(logits), *_mask(keep), local, _per_row(scale, logits), rows, live,
            keep is not None, block=_block(live), num_warps=WARPS,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return stats


def logit_gradient(
    logits: Float[Tensor, "C L"],
    local: Int[Tensor, " C"],
    terms: RowTerms,
    scale: Scale,
    keep: Bool[Tensor, "C L"] | None,
    out: Float[Tensor, "C L"],
) -> None:
    """As `rows.logit_gradient`."""
    rows, live = logits.shape
    if rows == 0 or live == 0:
        return
    a, level, slope = coefficients(terms, scale)
    block = _block(live)
    _gradient[(rows, triton.cdiv(live, block))](
        *_matrix(out), *_matrix(logits), *_mask(keep), local, _per_row(scale, logits),
        terms.top, terms.log_total, a, level, level if slope is None else slope,
        live, keep is not None, slope is not None, block=block, num_warps=WARPS,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip


@triton.jit
@no_type_check
def _statistics(
    stats, logits, row_stride, keep, keep_stride, local, scale, rows, live,
    has_keep: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Of one row, block after block: what was summed is rescaled where a block has a larger maximum."""
    row = tl.program_id(0).to(tl.int64)
    rate = tl.load(scale + row) / LN_2
    m = tl.full((), float("-inf"), tl.float32)
    s = tl.full((), 0.0, tl.float32)
    u = tl.full((), 0.0, tl.float32)
    for start in range(0, live, block):
        columns = start + tl.arange(0, block)
        inside = columns < live
        x = _load(logits + row * row_stride, columns, inside, keep, row * keep_stride, has_keep)
        largest = tl.maximum(m, tl.max(x, 0))
        origin = tl.where(largest == float("-inf"), 0.0, largest)
        shift = tl.where(m == float("-inf"), 0.0, (m - origin) * rate)
        z = (x - origin) * rate
        e = tl.exp2(z)
        weight = tl.exp2(shift)
        u = weight * (u + shift * s) + tl.sum(tl.where(x == float("-inf"), 0.0, z * e), 0)
        s = weight * s + tl.sum(e, 0)
        m = largest
    target = tl.load(local + row)
    owned = (target >= 0) & (target < live)
    tl.store(stats + row, m)
    tl.store(stats + rows + row, s)
    tl.store(stats + 2 * rows + row, u * LN_2)
    tl.store(stats + 3 * rows + row, tl.load(logits + row * row_stride + target, owned, 0.0).to(tl.float32))


@triton.jit
@no_type_check
def _gradient(
    out, out_stride, logits, row_stride, keep, keep_stride, local, scale, top, log_total, a, level, slope,
    live, has_keep: tl.constexpr, has_slope: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """p (level + slope log p), and `a` at the target, of one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < live
    x = _load(logits + row * row_stride, columns, inside, keep, row * keep_stride, has_keep)
    z = ((x - tl.load(top + row)) * tl.load(scale + row) - tl.load(log_total + row)) / LN_2
    factor = tl.load(level + row)
    if has_slope:
        factor += tl.load(slope + row) * tl.where(x == float("-inf"), 0.0, z) * LN_2
    grad = tl.exp2(z) * factor + tl.where(columns == tl.load(local + row), tl.load(a + row), 0.0)
    tl.store(out + row * out_stride + columns, grad, inside)


@triton.jit
@no_type_check
def _load(row, columns, inside, keep, keep_row, has_keep: tl.constexpr):
    """Logits in float32, -inf where there is none or none is kept."""
    if has_keep:
        inside = inside & (tl.load(keep + keep_row + columns, inside, 0) != 0)
    return tl.load(row + columns, inside, float("-inf")).to(tl.float32)


def _matrix(x: Tensor) -> tuple[Tensor, int]:
    """Itself and the distance of its rows; columns lie side by side."""
    assert x.stride(1) == 1 or x.shape[1] <= 1
    return x, x.stride(0)


def _mask(keep: Tensor | None) -> tuple[Tensor | None, int]:
    return (None, 0) if keep is None else _matrix(keep.view(torch.uint8))


def _per_row(scale: Scale, logits: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.contiguous()
    return logits.new_full((logits.shape[0],), scale, dtype=torch.float32)


def _block(live: int) -> int:
    return min(BLOCK, max(16, 1 << (live - 1).bit_length()))
