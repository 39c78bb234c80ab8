"""The worlds of `verify layouts`, made of the pools that all tests share."""

from __future__ import annotations

from typing import Any

import pytest

from mcore_rl.parallel.pool import Pool
from mcore_rl.verify.layouts.measure import Measured, critic_of, measure


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
        if missing := [name for name in algorithms if (case, name, loss) not in self.references]:
            measured, log_probs = self.pools[1].run(fn, case, missing, None, loss)[0]
            for name in missing:
                its = {key: one for key, one in measured.items() if key in (name, critic_of(name))}
                self.references[case, name, loss] = its, log_probs
        results: dict[str, Measured] = {}
        for name in algorithms:
            measured, log_probs = self.references[case, name, loss]
            results |= measured
        return results, log_probs


@pytest.fixture(scope="session")
def worlds(pool1: Pool, pool2: Pool, pool4: Pool) -> SharedPools:
    """One, two and four processes; those that no test needs never start."""
    return SharedPools(pool1, pool2, pool4)
