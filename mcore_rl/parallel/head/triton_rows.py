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
from jaxtyping import Float, Int
from torch import Tensor

from mcore_rl.parallel.head.rows import RowTerms, coefficients

BLOCK = 4096
"""columns in registers at once: 16 a thread"""
WARPS = 8
LN_2 = tl.constexpr(math.log(2))


def shard_statistics(
    logits: Float[Tensor, "C L"], local: Int[Tensor, " C"], scale: float, cap: float | None = None
) -> Float[Tensor, "4 C"]:
    """Compute the same as `rows.shard_statistics`."""
    rows, live = logits.shape
    stats = logits.new_empty(4, rows, dtype=torch.float32)
    if rows:
        _statistics[(rows,)](
            stats, *_matrix(logits), local, scale, cap or 1.0, rows, live, cap is not None,
            block=_block(live), num_warps=WARPS,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return stats


def logit_gradient(
    logits: Float[Tensor, "C L"],
    local: Int[Tensor, " C"],
    terms: RowTerms,
    scale: float,
    out: Float[Tensor, "C L"],
    cap: float | None = None,
) -> None:
    """Compute the same as `rows.logit_gradient`."""
    rows, live = logits.shape
    if rows == 0 or live == 0:
        return
    a, level, slope = coefficients(terms, scale)
    block = _block(live)
    _gradient[(rows, triton.cdiv(live, block))](
        *_matrix(out), *_matrix(logits), local, scale, cap or 1.0,
        terms.top, terms.log_total, a, level, level if slope is None else slope,
        live, slope is not None, cap is not None, block=block, num_warps=WARPS,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip


@triton.jit
@no_type_check
def _statistics(
    stats, logits, row_stride, local, scale, cap, rows, live, is_capped: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Sum one row block after block; what was summed is rescaled where a block has a larger maximum."""
    row = tl.program_id(0).to(tl.int64)
    rate = scale / LN_2
    m = tl.full((), float("-inf"), tl.float32)
    s = tl.full((), 0.0, tl.float32)
    u = tl.full((), 0.0, tl.float32)
    for start in range(0, live, block):
        columns = start + tl.arange(0, block)
        inside = columns < live
        x = _load(logits + row * row_stride, columns, inside)
        if is_capped:
            x = tl.where(x == float("-inf"), x, _capped(x, cap))
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
    own = tl.load(logits + row * row_stride + target, owned, 0.0).to(tl.float32)
    if is_capped:
        own = _capped(own, cap)
    tl.store(stats + 3 * rows + row, own)


@triton.jit
@no_type_check
def _gradient(
    out, out_stride, logits, row_stride, local, scale, cap, top, log_total, a, level, slope,
    live, has_slope: tl.constexpr, is_capped: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Write p (level + slope log p), and add `a` at the target, in one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < live
    x = _load(logits + row * row_stride, columns, inside)
    if is_capped:
        x = tl.where(x == float("-inf"), x, _capped(x, cap))
    z = ((x - tl.load(top + row)) * scale - tl.load(log_total + row)) / LN_2
    factor = tl.load(level + row)
    if has_slope:
        factor += tl.load(slope + row) * tl.where(x == float("-inf"), 0.0, z) * LN_2
    grad = tl.exp2(z) * factor + tl.where(columns == tl.load(local + row), tl.load(a + row), 0.0)
    if is_capped:
        grad *= 1.0 - (x / cap) * (x / cap)
    tl.store(out + row * out_stride + columns, grad, inside)


@triton.jit
@no_type_check
def _capped(x, cap):
    """Compute cap tanh(x / cap); by its series where the quotient of exponentials would cancel."""
    y = x / cap
    e = tl.exp2(tl.abs(y) * -2.0 / LN_2)
    far = (1.0 - e) / (1.0 + e)
    square = y * y
    near = y * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    return cap * tl.where(tl.abs(y) < 0.125, near, tl.where(y < 0, -far, far))


@triton.jit
@no_type_check
def _load(row, columns, inside):
    """Load logits in float32, -inf where there is none."""
    return tl.load(row + columns, inside, float("-inf")).to(tl.float32)


def _matrix(x: Tensor) -> tuple[Tensor, int]:
    """Return the matrix and the distance of its rows; its columns lie side by side."""
    assert x.stride(1) == 1 or x.shape[1] <= 1
    return x, x.stride(0)


def _block(live: int) -> int:
    return min(BLOCK, max(16, 1 << (live - 1).bit_length()))
