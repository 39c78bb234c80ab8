"""Lines for whoever watches a run: on a terminal a last line that says what is being done, elsewhere none.

Where no terminal is, work that takes minutes is said again now and then, so that nobody takes it for a hang.
Only the main rank shows anything; in other processes `say` prints, and the rest does nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from mcore_rl.spans import HERE, listening
from mcore_rl.terminal import printable

REDRAWN, FIRST_REMINDER = 0.5, 60.0
"""seconds between two drawings of the line; and until work is said again, then twice as many, and so on"""
DOING = {
    "rollout": "waiting for samples",
    "reward": "scoring samples",
    "score": "log-probs before the update",
    "train": "training",
    "publish": "publishing weights",
    "eval": "evaluating",
    "save": "saving a checkpoint",
    "release": "servers release their memory",
}
"""phase of a step -> what it is, for people"""
BAR = 20
"""characters of the bar"""


class Screen:
    """Standard error, of which the last line may be live."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, as a process does that was forked."""
        self._lock = threading.RLock()
        self._shown = self._live = self._drawn = False
        self._share, self._status = 0.0, ""
        self._what: Callable[[], str] = str
        self._since = self._reminder = time.monotonic()

    def say(self, message: str) -> None:
        """Print a whole message above the live line."""
        with self._lock:
            self._wipe()
            print(printable(message), file=sys.stderr, flush=True)

    def doing(self, what: str | Callable[[], str]) -> None:
        """From now on this is being done; a function is asked whenever it is shown, from another thread."""
        with self._lock:
            self._what = what if callable(what) else lambda: what
            self._since = time.monotonic()
            self._reminder = FIRST_REMINDER

    def progress(self, share: float, status: str) -> None:
        """How much of the run is done, 0 to 1, and what stands beside its bar."""
        with self._lock:
            self._share, self._status = share, status

    @contextmanager
    def showing(self, *, active: bool) -> Iterator[None]:
        """Show what is being done while it is inside, where `active`."""
        if not active or self._shown:
            yield
            return
        self._shown = True
        self._live = sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb")
        ended = threading.Event()
        thread = threading.Thread(target=self._show, args=(ended,), name="screen", daemon=True)
        thread.start()
        try:
            with listening(self):
                yield
        finally:
            ended.set()
            thread.join(5)
            with self._lock:
                self._wipe()
                self._shown = self._live = False

    def begun(self, lane: str, name: str) -> None:
        """See spans.Listener."""
        if lane == HERE and name in DOING:
            self.doing(DOING[name])

    def ended(self, lane: str, name: str, start: float, seconds: float) -> None:
        """See spans.Listener."""

    def line(self, columns: int) -> str:
        """The live line, cut to the width of the terminal."""
        full = round(self._share * BAR)
        bar = f"[{'#' * full}{'.' * (BAR - full)}]"
        parts = [bar, self._status, f"{self._what()} {time.monotonic() - self._since:.0f} s"]
        return "  ".join(filter(None, parts)).replace("\n", " ")[: max(0, columns - 1)]

    def _show(self, ended: threading.Event) -> None:
        while not ended.wait(REDRAWN):
            with self._lock, suppress(Exception):  # what is shown must not end what is done
                self._draw() if self._live else self._remind()

    def _draw(self) -> None:
        sys.stderr.write("\r\x1b[2K")
        sys.stderr.write(printable(self.line(shutil.get_terminal_size().columns)))
        sys.stderr.write("\r")  # what others print begins in the first column
        sys.stderr.flush()
        self._drawn = True

    def _remind(self) -> None:
        took = time.monotonic() - self._since
        if took >= self._reminder and (what := self._what()):
            print(printable(f"still {what}, for {took:.0f} s"), file=sys.stderr, flush=True)
            self._reminder *= 2

    def _wipe(self) -> None:
        if self._drawn:
            sys.stderr.write("\r\x1b[2K")
            self._drawn = False


SCREEN = Screen()
"""of this process"""
os.register_at_fork(after_in_child=SCREEN.forget)  # whose lock the thread may have held
