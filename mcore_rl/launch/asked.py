"""What a request to leave does to the process that starts the ranks, before they run and after them, and to
any process that is importing.

While the ranks run, torch's agent passes it on to them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from mcore_rl.errors import AskedToLeave, requests_to_leave

_SAID = b"mcore-rl: %s came before a rank was started; nothing was begun\n"
_SAID_OF_IMPORT = b"mcore-rl: %s was delivered during an import\n"


@contextmanager
def leaving_when_asked() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process, with the code that says that it may be tried again.

    At once, since there is nothing yet to close, and an exception would come out of whatever is being
    imported: compiled modules make another one of it. Ctrl-C stays what it is.
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


def leave_an_import(number: int, frame: FrameType | None) -> None:
    """End this process, whose handler of signals calls this, if `frame` is in an import; else return.

    Its children end with it.
    """
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            _end(_SAID_OF_IMPORT, number)
        frame = frame.f_back


def _leave(number: int, frame: FrameType | None) -> None:
    _end(_SAID, number)


def _end(said: bytes, number: int) -> NoReturn:
    os.write(2, said % signal.Signals(number).name.encode())  # print is not for handlers of signals
    os._exit(int(AskedToLeave(number).code or 0))
