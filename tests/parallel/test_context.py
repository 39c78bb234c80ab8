"""Context parallelism: the zig-zag split is a fair partition, sums and keys are those of whole sequences."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.model import platform
from mcore_rl.parallel.context import (
    gather_keys_values,
    gathered_places,
    local_tokens,
    sequence_grid,
    sequence_sums,
    zigzag_positions,
)
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import build_mesh, destroy_mesh
from mcore_rl.parallel.pool import Pool


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6))
def test_every_position_has_one_owner_and_every_rank_the_same_work(size: int, chunk: int) -> None:
    length = 2 * size * chunk
    owned = [zigzag_positions(length, size, rank) for rank in range(size)]
    assert sorted(torch.cat(owned).tolist()) == list(range(length))
    assert {len(positions) for positions in owned} == {2 * chunk}
    assert len({int(positions.sum()) for positions in owned}) == 1, "causal attention costs position + 1"


def test_ranks_own_a_chunk_from_each_end() -> None:
    assert zigzag_positions(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert zigzag_positions(8, 2, 1).tolist() == [2, 3, 4, 5]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=5))
def test_packed_tokens_are_split_sequence_by_sequence(size: int, chunks: list[int]) -> None:
    cu_seqlens = torch.tensor([0, *accumulate(2 * size * n for n in chunks)], dtype=torch.int32)
    parts = [local_tokens(cu_seqlens, size, rank) for rank in range(size)]
    assert sorted(torch.cat(parts).tolist()) == list(range(int(cu_seqlens[-1])))
    for part in parts:
        local = cu_seqlens // size
        for i in range(len(chunks)):
            mine = part[local[i] : local[i + 1]]
            assert mine.min() >= cu_seqlens[i]
            assert mine.max() < cu_seqlens[i + 1]
    places = gathered_places(cu_seqlens, size, int(cu_seqlens[-1]))
    assert torch.equal(torch.cat(parts)[places], torch.arange(len(places)))


# --- over ranks -------------------------------------------------------------------------------------------

SEQUENCES = 5


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """values [2, 12] and the sequence of each; sequence 3 has none."""
    values = torch.arange(24, dtype=torch.float64).view(2, 12)
    return values, torch.tensor([0, 0, 1, 1, 1, 2, 2, 4, 4, 4, 4, 4])


def summed(everything_on_rank_0: bool) -> torch.Tensor:
    values, sequence = rows()
    mine = slice(dist.get_rank(), None, 2)
    if everything_on_rank_0:
        mine = slice(0, 12 if dist.get_rank() == 0 else 0)
    return sequence_sums(values[:, mine].requires_grad_(), sequence[mine], SEQUENCES, dist.group.WORLD)


@pytest.mark.parametrize("everything_on_rank_0", [False, True])
def test_sums_are_those_of_whole_sequences(pool2: Pool, everything_on_rank_0: bool) -> None:
    values, sequence = rows()
    expected = torch.stack([values[:, sequence == i].sum(1) for i in range(SEQUENCES)], dim=1)
    for sums in pool2.run(summed, everything_on_rank_0):
        assert torch.equal(sums, expected)
        assert not sums.requires_grad
    alone = sequence_sums(values, sequence, SEQUENCES, None)
    assert torch.equal(alone, expected)


PLACE = torch.tensor([0, 1, 0, 2, 5, 1, 0, 0, 1, 2, 3, 4])
"""where the rows of `rows` lie in their sequences"""


def placed(everything_on_rank_0: bool) -> torch.Tensor:
    values, sequence = rows()
    mine = slice(dist.get_rank(), None, 2)
    if everything_on_rank_0:
        mine = slice(0, 12 if dist.get_rank() == 0 else 0)
    given = values[0, mine].requires_grad_()
    return sequence_grid(given, sequence[mine], PLACE[mine], (SEQUENCES, 6), dist.group.WORLD)


@pytest.mark.parametrize("everything_on_rank_0", [False, True])
def test_a_grid_has_the_rows_of_all_ranks_at_their_places(pool2: Pool, everything_on_rank_0: bool) -> None:
    values, sequence = rows()
    expected = torch.zeros(SEQUENCES, 6, dtype=torch.float64)
    for value, own, place in zip(values[0].tolist(), sequence.tolist(), PLACE.tolist(), strict=True):
        expected[own, place] = value
    for grid in pool2.run(placed, everything_on_rank_0):
        assert torch.equal(grid, expected)
        assert not grid.requires_grad
    assert torch.equal(sequence_grid(values[0], sequence, PLACE, (SEQUENCES, 6), None), expected)


def keys_and_gradients() -> list[torch.Tensor]:
    """Gathered keys and values, and the gradients of a loss in which each rank uses all of them."""
    platform.install()
    mesh = build_mesh(Layout(context=2), timeout=60.0)
    try:
        generator = torch.Generator().manual_seed(mesh.cp_rank)
        key, value = (torch.randn(3, 2, 4, generator=generator).requires_grad_() for _ in range(2))
        keys, values = gather_keys_values(key, value)
        ((mesh.cp_rank + 1) * keys.sum() + (values * values).sum()).backward()
        return [x.detach() for x in (key, value, keys, values, key.grad, value.grad)]
    finally:
        destroy_mesh()


def test_keys_and_values_of_all_ranks(pool2: Pool) -> None:
    """The gradient of a key is the sum over the ranks whose queries saw it."""
    first, second = pool2.run(keys_and_gradients)
    for mine in (first, second):
        assert torch.equal(mine[2], torch.cat([first[0], second[0]]))
        assert torch.equal(mine[3], torch.cat([first[1], second[1]]))
        assert torch.equal(mine[4], torch.full_like(mine[4], 3.0)), "1 from rank 0 and 2 from rank 1"
        torch.testing.assert_close(mine[5], 4 * mine[1])
