"""What a request to leave does to the process that starts the ranks: before they run, and after them.

While they run, torch's agent passes it on to them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mcore_rl.errors import AskedToLeave, requests_to_leave

_SAID = b"mcore-rl: %s came before a rank was started; nothing was begun\n"


@contextmanager
def leaving_when_asked() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block by AskedToLeave, whose exit code says that it may be tried again.

    Ctrl-C stays what it is.
    """
    before = {number: signal.getsignal(number) for number in _asking()}
    for number in before:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish_although_asked() -> None:
    """The ranks have left: what is to be said of them is said, whatever comes meanwhile."""
    for number in _asking():  # torch's handlers, which are still there, raise what nobody catches
        signal.signal(number, signal.SIG_IGN)


def _asking() -> list[signal.Signals]:
    return [number for number in requests_to_leave() if number != signal.SIGINT]


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, _SAID % signal.Signals(number).name.encode())  # print is not for handlers of signals
    raise AskedToLeave(number)
