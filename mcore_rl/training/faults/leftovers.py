"""No process outlives the run: what user code has started in a rank, and left behind, is ended.

Only what comes from this run is touched: a rank ends its own descendants, `launch_node` whatever carries the
name of its launch in its environment, which the ranks gave to their children, and those to theirs.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable

import psutil

from mcore_rl.training.faults.exits import say

_GRACE_SECONDS = 1.0
"""in which those that were on their way out go"""
_ROUNDS = 5
"""one that starts others while it is ended takes more than one"""
_POLL_SECONDS = 0.05
_HELPER = "from multiprocessing."
"""in the command line of Python's own helpers, which end with their owner and clean up then"""


def end_descendants() -> None:
    """End what this rank has started, except for what multiprocessing ends in order at exit."""
    managed = {child.pid for child in multiprocessing.active_children()}

    def left() -> list[psutil.Process]:
        children = psutil.Process().children()
        mine = [child for child in children if child.pid not in managed and not _is_helper(child)]
        return mine + [one for child in mine for one in _descendants(child)]

    _end(left, grace=0.0)


def end_launched(launch: str) -> None:
    """End whatever was started by the ranks of `launch`, which have all left, wherever it has gone since."""
    _end(lambda: [process for process in psutil.process_iter() if _is_of(process, launch)], _GRACE_SECONDS)


def _end(left: Callable[[], list[psutil.Process]], grace: float) -> None:
    deadline = time.monotonic() + grace
    while (processes := _alive(left())) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    for _ in range(_ROUNDS):
        if not processes:
            return
        for process in processes:
            say(f"{_name(process)} was still there at the end of the run; it is ended")
            _kill(process)
        psutil.wait_procs(processes, timeout=_GRACE_SECONDS)
        processes = _alive(left())


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if _status(process) not in (psutil.STATUS_ZOMBIE, None)]


def _status(process: psutil.Process) -> str | None:
    try:
        return process.status()
    except psutil.Error:
        return None


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _is_of(process: psutil.Process, launch: str) -> bool:
    try:
        return process.environ().get("TORCHELASTIC_RUN_ID") == launch
    except psutil.Error:  # it has ended, or belongs to somebody else
        return False


def _is_helper(process: psutil.Process) -> bool:
    try:
        return any(_HELPER in argument for argument in process.cmdline())
    except psutil.Error:
        return False


def _name(process: psutil.Process) -> str:
    try:
        return f"process {process.pid} ({' '.join(process.cmdline())[:60]}), which a rank had started,"
    except psutil.Error:
        return f"process {process.pid}"


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()  # psutil compares the time of its start: never another one with the same number
    except psutil.Error:
        return
