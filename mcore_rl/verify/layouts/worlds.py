"""Where layouts run: pools of processes on this machine, or the ranks that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mcore_rl.model import platform
from mcore_rl.parallel.pool import Pool

T = TypeVar("T")

CALL_SECONDS = 300.0
"""deadline of one layout with all algorithms"""


class Worlds(Protocol):
    """Runs a function on process groups of different sizes."""

    @property
    def largest(self) -> int | None:
        """Ranks there are; None where processes are started as needed."""
        ...

    @property
    def is_main(self) -> bool:
        """This process is given the answers."""
        ...

    def run(self, size: int, fn: Callable[..., T], *args: Any) -> T | None:
        """Rank 0's answer of `fn(*args)` on `size` ranks; None where this process is not given it."""
        ...


class Pools:
    """Processes of this machine; those of one size serve all layouts of that size."""

    largest = None
    is_main = True

    def __init__(self) -> None:
        """No process starts before the first `run`."""
        self._stack = ExitStack()
        self._pools: dict[int, Pool] = {}

    def __enter__(self) -> Pools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, size: int, fn: Callable[..., T], *args: Any) -> T | None:
        """Run `fn` on `size` ranks of a pool. Raises what a rank raised, or RankError."""
        if size not in self._pools:
            self._pools[size] = self._stack.enter_context(Pool(size))
        return self._pools[size].run(fn, *args, timeout=CALL_SECONDS)[0]


class Launched:
    """The ranks that torchrun started, over NCCL on CUDA and gloo elsewhere.

    The first `size` of them form a world of their own for every call; the others wait for its end.
    """

    def __init__(self) -> None:
        """From torchrun's environment; every rank constructs it."""
        self._store, self._rank, self.largest = next(
            rendezvous("env://", timeout=timedelta(seconds=CALL_SECONDS))
        )
        self.is_main = self._rank == 0
        self._calls = 0

    def __enter__(self) -> Launched:
        platform.install()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left: every call closes its own process group."""

    def run(self, size: int, fn: Callable[..., T], *args: Any) -> T | None:
        """Run `fn` on the first `size` ranks of this launch; every rank calls it."""
        self._calls += 1
        done = f"verify/{self._calls}/done"
        allowed = timedelta(seconds=CALL_SECONDS)
        if self._rank >= size:
            self._store.wait([done], allowed)
            return None
        store = PrefixStore(f"verify/{self._calls}", self._store)
        dist.init_process_group(
            platform.backend(), store=store, rank=self._rank, world_size=size, timeout=allowed
        )
        try:
            answer = fn(*args)
        finally:
            dist.destroy_process_group()
        if self.is_main:
            self._store.set(done, "")
        return answer if self.is_main else None
