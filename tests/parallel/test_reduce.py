"""Statistics over ranks: the same bits for every split, and for ranks that hold nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.algo.advantages import group_normalized, group_statistics
from mcore_rl.errors import DataError, RewardError
from mcore_rl.parallel.launch import Pool
from mcore_rl.parallel.reduce import (
    Moments,
    all_finite,
    gather_keyed,
    global_moments,
    merge_moments,
    moments,
    sum_counts,
)

# --- in one process ---------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=9), min_size=1, max_size=4))
def test_merged_moments_are_those_of_the_union(parts: list[list[float]]) -> None:
    together = np.array([x for part in parts for x in part])
    merged = merge_moments([moments(torch.tensor(part, dtype=torch.float64)) for part in parts])
    assert merged.size == len(together)
    if len(together):
        assert merged.mean == pytest.approx(together.mean(), rel=1e-12, abs=1e-12)
        assert merged.variance(0) == pytest.approx(together.var(), rel=1e-12, abs=1e-9)


def test_merging_survives_a_large_mean() -> None:
    values = 1e4 + torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64)
    assert merge_moments([moments(values[:1]), moments(values[1:])]).variance(0) == pytest.approx(
        0.0125, rel=1e-9
    )
    assert moments(values).variance() == pytest.approx(0.05 / 3, rel=1e-9)


def test_moments_of_too_little() -> None:
    nothing = moments(torch.tensor([]))
    assert nothing == Moments(0, 0, 0) == merge_moments([nothing, nothing])
    assert nothing.variance() == moments(torch.tensor([3.0])).variance() == 0


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ([("g", "1"), ("g", "1")], [1.0, 2.0], r"\('g', '1'\) occurs twice"),
        ([("g", "1")], [1.0, 2.0], "rank 0: 1 keys, 2 values"),
    ],
)
def test_keys_are_unique_and_paired(keys: list, values: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        gather_keyed(keys, values, None)


# --- over ranks -------------------------------------------------------------------------------------------


SPECIAL = [0.0, 1.0, 0.1, -2.5, 1e4, 1e4 + 0.1, 1e4 + 0.2]
Placed = list[tuple[tuple[str, str], float, int]]
"""((group id, sample id), reward, rank that holds it)"""


@st.composite
def rollouts(draw: st.DrawFn) -> Placed:
    """Groups of 0 to 6 samples, some constant, in any order, spread over the first 1 to 4 ranks."""
    ranks = draw(st.integers(1, 4))
    value = st.sampled_from(SPECIAL) | st.floats(-1e3, 1e3, width=32)
    group = st.lists(value, max_size=6) | st.tuples(value, st.integers(1, 6)).map(lambda c: [c[0]] * c[1])
    placed = [
        ((f"p{number}@1", str(i)), reward, draw(st.integers(0, ranks - 1)))
        for number, rewards in enumerate(draw(st.lists(group, min_size=1, max_size=6)))
        for i, reward in enumerate(rewards)
    ]
    return draw(st.permutations(placed))


def batch_normalized(keys: list[tuple[str, str]], rewards: list[float]) -> list[float]:
    statistics = group_statistics([key[0] for key in keys], rewards)
    return group_normalized(torch.tensor(rewards, dtype=torch.float64), statistics, std="batch").tolist()


def advantages_on_this_rank(placed: Placed) -> list[float]:
    mine = [(key, reward) for key, reward, rank in placed if rank == dist.get_rank()]
    keys, rewards = gather_keyed([k for k, _ in mine], [r for _, r in mine], dist.group.WORLD)
    return batch_normalized(keys, rewards)


@settings(max_examples=60)
@given(placed=rollouts())
def test_advantages_do_not_depend_on_the_split_bit_for_bit(pool4: Pool, placed: Placed) -> None:
    together = sorted((key, reward) for key, reward, _ in placed)
    expected = batch_normalized([key for key, _ in together], [reward for _, reward in together])
    assert pool4.run(advantages_on_this_rank, placed) == [expected] * 4


def token_values(seed: int) -> torch.Tensor:
    return 50 + torch.randn(37, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def everything_on_ranks(empty: bool) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    values = token_values(0)[rank::world] if not empty else token_values(0)[: 37 if rank == 1 else 0]
    group = dist.group.WORLD
    infinite = torch.tensor([1.0, math.inf if rank == world - 1 else 2.0])
    return {
        "moments": global_moments(values, group),
        "counts": sum_counts([len(values), rank], group),
        "finite": all_finite(torch.zeros(0 if empty else 3), group),
        "infinite": all_finite(infinite, group),
    }


@pytest.mark.parametrize("empty", [False, True], ids=["split", "on one rank"])
def test_moments_counts_and_flags(pool4: Pool, empty: bool) -> None:
    results = pool4.run(everything_on_ranks, empty)
    assert all(result == results[0] for result in results)
    dense = token_values(0)
    assert results[0]["moments"].mean == pytest.approx(dense.mean().item(), rel=1e-12)
    assert results[0]["moments"].variance() == pytest.approx(dense.var().item(), rel=1e-12)
    assert results[0]["counts"] == [37, 6]
    assert results[0]["finite"] is True
    assert results[0]["infinite"] is False


def fail_on_ranks(kind: str) -> str:
    """One rank has bad input; which error does this rank see?"""
    rank = dist.get_rank()
    keys, values = [("g", str(rank))], [float(rank)]
    if rank == 1:
        keys, values = {
            "nan": (keys, [math.nan]),
            "none": (keys, [None]),
            "twice": ([("g", "0")], values),
            "unpaired": (keys, []),
        }[kind]
    try:
        keys, values = gather_keyed(keys, values, dist.group.WORLD)
        group_statistics([key[0] for key in keys], values)
    except (DataError, RewardError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("kind", "message"),
    [("nan", "RewardError"), ("none", "RewardError"), ("twice", "DataError"), ("unpaired", "DataError")],
)
def test_bad_input_on_one_rank_is_the_same_error_on_all(pool2: Pool, kind: str, message: str) -> None:
    errors = pool2.run(fail_on_ranks, kind)
    assert errors[0] == errors[1]
    assert errors[0].startswith(message)
