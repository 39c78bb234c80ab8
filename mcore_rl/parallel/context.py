"""Context parallelism: which tokens of a packed micro-batch a rank holds, and sums over whole sequences.

Zig-zag split: every sequence is padded to a multiple of 2 * cp and cut into 2 * cp equal chunks; rank r owns
chunks r and 2 * cp - 1 - r, so that causal attention costs every rank the same (Megatron-Core, Transformer
Engine THD).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor


def zigzag_positions(length: int, size: int, rank: int) -> Int[Tensor, " local"]:
    """Positions in a padded sequence of `length` that `rank` of `size` owns: its two chunks, ascending."""
    chunk = length // (2 * size)
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])


def local_tokens(cu_seqlens: Int[Tensor, " boundaries"], size: int, rank: int) -> Int[Tensor, " local"]:
    """Indices into the packed tokens that `rank` of `size` owns, sequence by sequence."""
    bounds = cu_seqlens.tolist()
    return torch.cat([start + zigzag_positions(stop - start, size, rank) for start, stop in pairwise(bounds)])


def gathered_places(cu_seqlens: Int[Tensor, " boundaries"], size: int, tokens: int) -> Int[Tensor, " tokens"]:
    """Where each of `tokens` packed tokens lies when every rank's `local_tokens` are gathered, rank by rank.

    Computed where `cu_seqlens` is, without reading it on the host.
    """
    boundaries = cu_seqlens.long()
    token = torch.arange(tokens, device=boundaries.device)
    sequence = torch.bucketize(token, boundaries[1:], right=True)
    start = boundaries[sequence]
    chunk = (boundaries[sequence + 1] - start) // (2 * size)
    number = (token - start) // chunk
    second = number >= size
    rank = torch.where(second, 2 * size - 1 - number, number)
    return rank * (tokens // size) + start // size + second * chunk + (token - start) % chunk


def sequence_sums(
    values: Float[Tensor, "K R"],
    sequence: Int[Tensor, " R"],
    num_sequences: int,
    group: dist.ProcessGroup | None,
) -> Float[Tensor, "K B"]:
    """Sum each row of `values` per sequence over the context-parallel `group`; outside autograd.

    `sequence[r]` in [0, B) says whose row r is. A rank without rows still joins the collective.
    """
    with torch.no_grad():
        sums = values.new_zeros(values.shape[0], num_sequences).index_add_(1, sequence, values)
        if group is not None and group.size() > 1:
            dist.all_reduce(sums, group=group)
    return sums


def sequence_maxima(
    values: Float[Tensor, " R"],
    sequence: Int[Tensor, " R"],
    num_sequences: int,
    group: dist.ProcessGroup | None,
) -> Float[Tensor, " B"]:
    """The largest of `values` of each sequence over the context-parallel `group`, at least 0.

    Outside autograd.
    As in `sequence_sums`, a rank without rows still joins the collective.
    """
    with torch.no_grad():
        found = values.new_zeros(num_sequences).scatter_reduce_(0, sequence, values, "amax")
        if group is not None and group.size() > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found


def sequence_grid(
    values: Float[Tensor, " R"],
    sequence: Int[Tensor, " R"],
    place: Int[Tensor, " R"],
    shape: tuple[int, int],
    group: dist.ProcessGroup | None,
) -> Float[Tensor, "B T"]:
    """[B, T] = `shape` the values of whole sequences at their places; 0 where there is no row.

    Every row has a place of its own in [0, T) of its sequence, and lies on one rank of the context-parallel
    `group`. As in `sequence_sums`, outside autograd, and a rank without rows joins the collective.
    """
    with torch.no_grad():
        grid = values.new_zeros(shape).index_put_((sequence, place), values)
        if group is not None and group.size() > 1:
            dist.all_reduce(grid, group=group)
    return grid


def gather_keys_values(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """[T_local, K, D] of every context-parallel rank -> [cp * T_local, K, D], rank after rank.

    The backward pass is a reduce-scatter: each rank's queries contribute to every key's gradient.
    """
    both = tensor_parallel.gather_from_sequence_parallel_region(
        torch.cat([key, value], dim=-1), group=parallel_state.get_context_parallel_group()
    )
    return both.split([key.shape[-1], value.shape[-1]], dim=-1)
