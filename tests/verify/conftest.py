"""The worlds of `verify layouts`, made of the pools that all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mcore_rl.parallel.pool import Pool
from tests.conftest import check_annotations


class SharedPools:
    """As verify_layouts.worlds.Pools, with pools that outlive it."""

    largest = None
    is_main = True

    def __init__(self, *pools: Pool) -> None:
        self.pools = {pool.world: pool for pool in pools}

    def __enter__(self) -> SharedPools:
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, size: int, fn, *args: Any):
        return self.pools[size].run(fn, *args)[0]


@pytest.fixture(scope="session")
def worlds(pool2: Pool, pool4: Pool) -> Iterator[SharedPools]:
    """One, two and four processes; those that no test needs never start."""
    with Pool(1, setup=check_annotations) as pool1:
        yield SharedPools(pool1, pool2, pool4)
