"""The launcher's watch over ranks that are stopped: a stopped process cannot say so, and has no timers.

The other ranks name one that is stopped (faults/watchdog.py). Where there is none, or all of them are
stopped, only who started them can.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from mcore_rl.errors import EXIT_RETRYABLE, StorageError
from mcore_rl.log import append_event
from mcore_rl.training.faults.exits import say
from mcore_rl.training.faults.siblings import ranks_below
from mcore_rl.training.faults.watchdog import HANG

_POLL_SECONDS = 2.0


@contextmanager
def ending_stopped(launch: str, run_dir: Path, limit: float) -> Iterator[None]:
    """End ranks of `launch`, children of this process, that are stopped for `limit` seconds on end.

    Only time in which this process ran counts: where a scheduler suspends a whole job, it goes on later.
    """
    closed = threading.Event()
    watch = StoppedRanks(run_dir, limit)

    def look() -> None:
        last = time.monotonic()
        while not closed.wait(min(_POLL_SECONDS, limit / 4)):
            now = time.monotonic()
            watch.look(ranks_below(psutil.Process(), launch), min(now - last, 2 * _POLL_SECONDS))
            last = now

    thread = threading.Thread(target=look, name="stopped ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()


class StoppedRanks:
    """For how long each rank has been seen stopped."""

    def __init__(self, run_dir: Path, limit: float) -> None:
        """`limit`: seconds after which one is ended."""
        self._run_dir, self._limit = run_dir, limit
        self._stopped: dict[int, float] = {}

    def look(self, ranks: Mapping[int, psutil.Process], seconds: float) -> None:
        """Look at each rank's process, `seconds` after the last time; end those that are stopped too long."""
        found = {rank: process for rank, process in ranks.items() if _is_stopped(process)}
        self._stopped = {rank: self._stopped.get(rank, 0.0) + seconds for rank in found}
        for rank, process in found.items():
            if self._stopped[rank] > self._limit:
                self._end(rank, process)

    def _end(self, rank: int, process: psutil.Process) -> None:
        message = (
            f"rank {rank}: its process {process.pid} has been stopped (SIGSTOP) for {self._limit:g} s, and"
            " was ended: train.step_timeout, and 15 s in which other ranks would have said so. Find who "
            "stopped it; one that is continued in time (SIGCONT) goes on"
        )
        say(message)
        with suppress(StorageError):  # a full disk must not keep it
            append_event(
                self._run_dir, "error", rank=rank, type=HANG, message=message, exit_code=EXIT_RETRYABLE
            )
        with suppress(psutil.Error):
            process.kill()


def _is_stopped(process: psutil.Process) -> bool:
    """By a signal; not by a debugger, beside which somebody sits."""
    with suppress(psutil.Error):
        return process.status() == psutil.STATUS_STOPPED
    return False
