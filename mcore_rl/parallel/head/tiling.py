"""How many rows the head works on at once: bounds on memory that keep its GEMMs large."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mcore_rl.parallel.head.rows import accumulate_dtype

MIB = 1 << 20
MAX_ROWS = 1024


class Tiling(NamedTuple):
    """Row counts, each a multiple of the one before it (the last ones may be cut short)."""

    tile: int
    """rows of one GEMM for logits; the same in every pass, so that old and current log-probs round alike"""
    wave: int
    """whose logits are alive between their statistics and their gradient"""
    chunk: int
    """rows of one GEMM each for the gradient in hidden states and weight"""
    columns: int
    """vocabulary rows of one GEMM for logits, the same in every pass as well"""

    @classmethod
    def of(cls, vocab_rows: int, dtype: torch.dtype, device: torch.device) -> Tiling:
        """For `vocab_rows` lm_head rows per rank, padding included: the same on every rank of a group.

        On a CPU logits have the dtype of the GEMM and their gradient takes their place: 64 MiB of them to
        differentiate, 16 to score. Rows are what a GEMM wants more of, since each tile of rows reads the
        whole weight again, so logits are cut along the vocabulary as well.
        On a GPU 16-bit inputs give fp32 logits, at most 320 MiB of them, and 16-bit gradients, at most 160
        MiB: 1024 and 4096 rows at 16032 (a 128256-token vocabulary on 8 ranks), 64 and 125 MiB.
        """
        if device.type == "cpu":
            rows = _rows(64 * MIB, vocab_rows * dtype.itemsize)
            return cls(rows, rows, rows, 16 * MIB // (rows * dtype.itemsize))
        tile = _rows(320 * MIB, vocab_rows * accumulate_dtype(dtype).itemsize)
        if in_place(dtype, device):
            return cls(tile, tile, tile, vocab_rows)
        fitting = 160 * MIB // (vocab_rows * dtype.itemsize) // tile
        return cls(tile, tile, tile * max(1, min(4, fitting)), vocab_rows)


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
