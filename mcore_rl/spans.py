"""What this process does, and when: spans of work, heard by whoever draws a timeline or a line of a terminal.

Without a listener a span costs next to nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

HERE = ""
"""the lane of this process; other lanes are servers, by their urls"""


class Listener(Protocol):
    """Is told of every span, on the thread that does the work. It must not raise."""

    def begun(self, lane: str, name: str) -> None:
        """`name` begins in `lane`."""
        ...

    def ended(self, lane: str, name: str, start: float, seconds: float) -> None:
        """It has ended; `start` is in unix seconds."""
        ...


_listeners: list[Listener] = []
os.register_at_fork(after_in_child=_listeners.clear)  # a forked process is another one


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """The listener hears what happens inside."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def span(name: str, lane: str = HERE) -> Iterator[None]:
    """What happens inside is called `name`."""
    heard = tuple(_listeners)
    if not heard:
        yield
        return
    start, clock = time.time(), time.monotonic()
    for listener in heard:
        listener.begun(lane, name)
    try:
        yield
    finally:
        seconds = time.monotonic() - clock
        for listener in heard:
            listener.ended(lane, name, start, seconds)
