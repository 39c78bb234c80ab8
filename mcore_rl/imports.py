"""How a process of ours is started, and what it does before it imports torch: large pages, no collections.

Python's collector walks all that was imported again and again while more is. A rank imports some 3500
modules; such walks were a seventh of its start, most of a CPU-second, and found nothing to free.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def large_pages() -> None:
    """Ask torch for pages of 2 MiB under large tensors in host memory, here and in processes started here.

    Each of them saves 512 translations of addresses: a step on a CPU takes a twentieth less of its time, and
    what is freed goes back whole. torch looks once, at its first tensor; whoever has set the variable is not
    overruled.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def python_module(name: str) -> list[str]:
    """The command of a process that runs a module of ours: it finds what this process finds.

    `python -m` puts the current directory before the standard library. The `mcore-rl` script does not, and
    neither do the processes that come of it: a types.py beside a configuration is no part of them.
    """
    return [sys.executable, *([] if _is_here(sys.path[0]) else ["-P"]), "-m", name]


def _is_here(place: str) -> bool:
    try:
        return os.path.samefile(place or ".", ".")
    except OSError:  # the directory of the `mcore-rl` script, for one, may be gone
        return False


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection inside; where torch is imported there, none walks afterwards what there is by then.

    Modules stay. Later there may be more than them: a model that was let go of, with its process groups,
    would stay with them for good.
    """
    if not gc.isenabled():  # inside another one, or where the caller wants none
        yield
        return
    modules_alone = "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if modules_alone:
            gc.freeze()
        gc.enable()
