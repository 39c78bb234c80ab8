"""Profilers over a window of steps, on every rank: torch's, the allocator's history, ranges for Nsight."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mcore_rl.directories import storage_error
from mcore_rl.errors import ConfigError
from mcore_rl.spans import HERE, listening

MOST_EVENTS = 100_000
"""of the allocator, the newest"""


def check_profile(record: Sequence[str]) -> None:
    """Raises ConfigError where something is recorded that needs a GPU, and there is none."""
    needs = [name for name in record if name != "torch"]
    if needs and not torch.cuda.is_available():
        raise ConfigError(f"watch.profile: {needs[0]} is of a GPU, and there is none here; leave torch alone")


class ProfiledSteps:
    """Records from the end of the step before the window to the end of its last step.

    A window that begins with step 1 has what comes before the first step in it.
    """

    def __init__(
        self, run_dir: Path, rank: int, window: tuple[int, int] | None, record: Sequence[str]
    ) -> None:
        self._window, self._record = window, record if window else ()
        self._stem = run_dir / "profile" / f"steps_{'-'.join(map(str, window or ()))}.rank_{rank}"
        self._running: ExitStack | None = None
        self._done = False
        self.written: list[Path] = []

    def reached(self, step: int) -> None:
        """`step` is over; begin or end what is due.

        Raises:
            StorageError: what was recorded cannot be written.
        """
        if self._window is None or self._done:
            return
        first, last = self._window
        if self._running is None and first - 1 <= step < last:
            self._begin()
        elif self._running is not None and step >= last:
            self._end()

    def close(self) -> None:
        """The run ends inside the window, or behind it: nothing more is written."""
        self._done = True
        if self._running is not None:
            self._running.close()
            self._running = None

    def _begin(self) -> None:
        self._running = stack = ExitStack()
        self._torch = None
        if "torch" in self._record:
            self._torch = stack.enter_context(torch.profiler.profile())
        if "memory" in self._record:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
            stack.callback(torch.cuda.memory._record_memory_history, enabled=None)
        if "nvtx" in self._record:
            stack.enter_context(listening(_Ranges()))
            runtime: Any = torch.cuda.cudart()
            runtime.cudaProfilerStart()
            stack.callback(runtime.cudaProfilerStop)

    def _end(self) -> None:
        assert self._running is not None
        try:
            self._stem.parent.mkdir(parents=True, exist_ok=True)
            if "memory" in self._record:
                path = self._stem.with_name(f"{self._stem.name}.memory.pickle")
                torch.cuda.memory._dump_snapshot(str(path))
                self.written.append(path)
            profiler = self._torch
            self.close()
            if profiler is not None:
                path = self._stem.with_name(f"{self._stem.name}.json.gz")
                profiler.export_chrome_trace(str(path))
                self.written.append(path)
        except OSError as error:
            raise storage_error(self._stem.parent, error, remedy="remove watch.profile_steps") from error


class _Ranges:
    """A spans.Listener: the phases of the main thread as ranges of NVTX."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._open = 0

    def begun(self, lane: str, name: str) -> None:
        """See spans.Listener."""
        if lane == HERE and threading.get_ident() == self._thread:
            torch.cuda.nvtx.range_push(name)
            self._open += 1

    def ended(self, lane: str, name: str, start: float, seconds: float) -> None:
        """See spans.Listener. A range that was open before is not ours."""
        if lane == HERE and threading.get_ident() == self._thread and self._open:
            torch.cuda.nvtx.range_pop()
            self._open -= 1
