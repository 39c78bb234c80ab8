"""Ends a run that makes no progress, and says where every rank stood: a hang has no error of its own."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mcore_rl.errors import EXIT_RETRYABLE
from mcore_rl.training.faults.deadline import ExitTimer
from mcore_rl.training.faults.exits import append, rank, say
from mcore_rl.training.faults.siblings import state_of

GRACE_SECONDS = 5.0
"""in which the other ranks reach the same deadline and write their stacks"""
HANG = "Hang"
"""the type of the watchdog's error event"""
_SHOWN = 8
"""ranks that a message names"""


def collective_timeout(step_timeout: float) -> float:
    """Seconds that a collective waits: the watchdog, which knows all ranks, has spoken before it gives up."""
    return step_timeout + 3 * GRACE_SECONDS


class Watchdog:
    """Every rank has one, and calls `progress` at the same places.

    After `timeout` seconds without it a thread writes the stacks of all threads to rank_N.txt, waits a
    moment for the other ranks to do the same, and ends the process. Behind it stand timers that need no
    interpreter, for a call that hangs without letting go of the interpreter's lock: faulthandler's for the
    stacks, and one that ends the process with the same exit code.
    """

    def __init__(self, run_dir: Path, attempt: str, world_size: int, timeout: float) -> None:
        """`attempt` is of this attempt alone: a file in RUN_DIR/stacks/`attempt` is one of its ranks."""
        self._run_dir, self._directory = run_dir, run_dir / "stacks" / attempt
        self._world_size, self._timeout = world_size, timeout
        self._closed = threading.Event()
        self._since = "the start"
        self._deadline = time.monotonic() + timeout
        self._last_resort = ExitTimer(EXIT_RETRYABLE)

    def progress(self, what: str) -> None:
        """`what` is done; the clock starts again."""
        self._since = what
        self._deadline = time.monotonic() + self._timeout
        faulthandler.dump_traceback_later(self._timeout + 2 * GRACE_SECONDS)
        self._last_resort.start(self._timeout + 3 * GRACE_SECONDS)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the main thread while it is inside."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.progress(self._since)
        thread.start()
        try:
            yield
        finally:
            self._closed.set()
            self._last_resort.stop()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(max(0.0, self._deadline - time.monotonic())):
            if time.monotonic() >= self._deadline:
                self._end()

    def _end(self) -> None:
        """Does not return."""
        try:
            with suppress(OSError):  # a full disk must not keep back that nothing goes on
                self._write_stacks()
            end = time.monotonic() + GRACE_SECONDS
            while len(self._stacks()) < self._world_size and time.monotonic() < end:
                time.sleep(0.05)
            self._report()
        finally:
            os._exit(EXIT_RETRYABLE)  # the main thread may be in a call that nothing ends

    def _write_stacks(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        partial = self._directory / f"rank_{rank()}.partial"
        with partial.open("w") as file:
            file.write(f"{_place()}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        partial.rename(partial.with_suffix(".txt"))

    def _stacks(self) -> list[Path]:
        return list(self._directory.glob("rank_*.txt"))

    def _report(self) -> None:
        """By the first rank whose stack is there; the line of the rank that stood elsewhere comes first."""
        stacks = sorted((int(path.stem.removeprefix("rank_")), path) for path in self._stacks())
        silent = sorted(set(range(self._world_size)) - {number for number, _ in stacks})
        message = (
            f"no progress for {self._timeout:g} s (train.step_timeout) since {self._since}; "
            f"stacks of {len(stacks)} of {self._world_size} ranks are in {self._directory}"
        )
        message += "".join(
            f"\n  rank {number} wrote no stack: it is stopped, swapped out or dead ({state_of(number)})"
            for number in silent[:_SHOWN]
        ) + (f"\n  and {len(silent) - _SHOWN} more ranks" if len(silent) > _SHOWN else "")
        append(self._run_dir, "error", type=HANG, message=message, exit_code=EXIT_RETRYABLE)
        if stacks and rank() != stacks[0][0]:
            return
        places: dict[str, list[int]] = {}
        for number, path in stacks:
            places.setdefault(path.read_text().partition("\n")[0], []).append(number)
        lines = sorted(places.items(), key=lambda item: len(item[1]))
        say(message + "".join(f"\n  {_names(ranks)} {place}" for place, ranks in lines))


def _names(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN])) + (", ..." if len(ranks) > _SHOWN else "")
    return f"rank {shown}:" if len(ranks) == 1 else f"ranks {shown}:"


def _place() -> str:
    """Where the main thread stands: the innermost frame."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "the main thread has ended"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
