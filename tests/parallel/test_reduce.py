"""Statistics over ranks: the same bits for every split, and for ranks that hold nothing."""

from __future__ import annotations

import math
import random

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

ROUNDS = 12


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


def rollout(seed: int) -> list[tuple[tuple[str, str], float]]:
    """Samples of unequal groups, some constant, some short of a sample."""
    dice = random.Random(seed)
    samples = []
    for group in range(dice.randint(1, 6)):
        reward = (
            (lambda: 0.7) if dice.random() < 0.3 else (lambda: dice.choice([0.0, 1.0, 0.1, 1e4 + 0.3, -2.5]))
        )
        samples += [((f"p{group}@1", str(i)), reward()) for i in range(8) if dice.random() < 0.7]
    return samples


def reference(seed: int) -> list[float]:
    samples = sorted(rollout(seed))
    statistics = group_statistics([key[0] for key, _ in samples], [reward for _, reward in samples])
    return group_normalized(
        torch.tensor([r for _, r in samples], dtype=torch.float64), statistics, std="batch"
    ).tolist()


def subgroups() -> list[dist.ProcessGroup]:
    """Groups of 1 to world ranks, each starting at rank 0."""
    return [dist.new_group(list(range(n))) for n in range(1, dist.get_world_size() + 1)]


def advantages_on_ranks() -> list[tuple[int, int, list[float]]]:
    """(seed, ranks, advantages) of random splits of each rollout over 1 to 4 ranks."""
    results = []
    for group in subgroups():
        if dist.get_rank() >= (ranks := dist.get_world_size(group)) or ranks < 1:
            continue
        for seed in range(ROUNDS):
            dice = random.Random(1000 * ranks + seed)
            mine = [s for s in rollout(seed) if dice.randrange(ranks) == dist.get_rank()]
            mine.reverse()
            keys, values = gather_keyed([key for key, _ in mine], [value for _, value in mine], group)
            statistics = group_statistics([key[0] for key in keys], values)
            advantage = group_normalized(torch.tensor(values, dtype=torch.float64), statistics, std="batch")
            results.append((seed, ranks, advantage.tolist()))
    return results


def test_advantages_do_not_depend_on_the_split_bit_for_bit(pool4: Pool) -> None:
    seen = set()
    for results in pool4.run(advantages_on_ranks):
        for seed, ranks, advantage in results:
            assert advantage == reference(seed)
            seen.add((seed, ranks))
    assert seen == {(seed, ranks) for seed in range(ROUNDS) for ranks in (1, 2, 3, 4)}


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
