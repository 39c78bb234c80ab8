"""Sums over the sequences of a flat row vector.

Rows are the scored (unmasked) response tokens of all sequences end to end: sequence i owns rows
[offsets[i], offsets[i+1]), which may be none. R rows, N sequences.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def offsets_of(lengths: Int[Tensor, " N"]) -> Int[Tensor, " N_plus_1"]:
    """[N] row counts -> [N+1] boundaries, starting at 0."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def sequence_sum(
    values: Float[Tensor, " R"], sequence: Int[Tensor, " R"], sequences: int
) -> Float[Tensor, " N"]:
    """Sum of `values` per sequence; `sequence[r]` in [0, sequences). The caller adds up the CP ranks."""
    return values.new_zeros(sequences).index_add(0, sequence, values)


def sequence_mean(
    values: Float[Tensor, " R"], sequence: Int[Tensor, " R"], sequences: int
) -> Float[Tensor, " N"]:
    """Mean of `values` per sequence; 0 for a sequence without rows."""
    counts = torch.bincount(sequence, minlength=sequences).clamp(min=1)
    return sequence_sum(values, sequence, sequences) / counts


def spread(per_sequence: Float[Tensor, " N"], offsets: Int[Tensor, " N_plus_1"]) -> Float[Tensor, " R"]:
    """[N] one number per sequence -> [R] the same number on each of its rows."""
    return per_sequence.repeat_interleave(offsets.diff())
