"""Attempts that share a store: everyone gets the same new name, whatever the dead have left behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from mcore_rl.parallel.attempt import agree

WORLD = 3


def meet(store: dist.Store, ranks: range, timeout: float = 20.0) -> list[str]:
    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(lambda rank: agree(store, rank, WORLD, timeout), ranks))


def test_attempts_have_names_of_their_own():
    store, names = dist.HashStore(), []
    for _ in range(3):
        attempt = meet(store, range(WORLD))
        assert len(set(attempt)) == 1
        names.append(attempt[0])
    assert len(set(names)) == 3


def test_a_rank_that_died_while_they_met_is_not_met():
    """Its word and its acceptance are there; only a living rank 2 completes the attempt."""
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match=r"rank 0"):
        meet(store, range(2, 3), timeout=0.3)
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\]"):
        meet(store, range(2), timeout=0.3)
    assert len(set(meet(store, range(WORLD)))) == 1
