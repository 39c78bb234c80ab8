"""The worlds of `verify layouts`, made of the pools that all tests share."""

from __future__ import annotations

from typing import Any

import pytest

from mcore_rl.parallel.pool import Pool
from mcore_rl.verify.layouts.measure import Measured, measure


class SharedPools:
    """The Pools of verify.layouts, with pools that outlive it; what one rank measures is measured once."""

    largest = None
    is_main = True

    def __init__(self, *pools: Pool) -> None:
        self.pools = {pool.world: pool for pool in pools}
        self.references: dict[tuple, Any] = {}

    def __enter__(self) -> SharedPools:
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, size: int, fn, *args: Any):
        if fn is not measure or size > 1:
            return self.pools[size].run(fn, *args)[0]
        case, algorithms, log_probs, loss = args
        if log_probs is not None:  # a layout of one rank, which the reference may not answer for
            return self.pools[1].run(fn, *args)[0]
        results: dict[str, Measured] = {}
        for name in algorithms:
            key = (case, name, loss)
            if key not in self.references:
                self.references[key] = self.pools[1].run(measure, case, (name,), None, loss)[0]
            measured, log_probs = self.references[key]
            results |= measured
        return results, log_probs


@pytest.fixture(scope="session")
def worlds(pool1: Pool, pool2: Pool, pool4: Pool) -> SharedPools:
    """One, two and four processes; those that no test needs never start."""
    return SharedPools(pool1, pool2, pool4)
