"""Imports without Python's collector, which walks all that was imported again and again while more is.

A rank imports some 3500 modules; such walks were a seventh of its start, most of a CPU-second, and found
nothing to free.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection inside, and none walks afterwards what there is by then: what is imported stays."""
    if not gc.isenabled():  # inside another one, or where the caller wants none
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
