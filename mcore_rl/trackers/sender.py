"""Hands the steps of a run to its services from a thread, so that training never waits for one."""

from __future__ import annotations

import math
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from mcore_rl.errors import StorageError
from mcore_rl.terminal import printable
from mcore_rl.trackers.prometheus import Prometheus
from mcore_rl.trackers.services import SERVICES, TrackedRun, TrackingService

CLOSE_SECONDS = 30.0
"""how long the end of a run waits for its services"""
_MOST_WAITING = 10_000
"""steps that a service may be behind; the oldest are dropped then"""

ENDPOINT: Mapping[str, Callable[[TrackedRun], TrackingService]] = {"prometheus": Prometheus}
"""what a key of its own asks for, since it is no service elsewhere"""
Send = Callable[[int, Mapping[str, Any]], None]
Note = Callable[[str, str], None]
"""(service, why it gets no more)"""


@contextmanager
def tracked(names: Sequence[str], run: TrackedRun, note: Note) -> Iterator[Send]:
    """What hands a step's metrics to the services of these names; on exit they are told how the run ended.

    A service that raises gets no more, which is noted once, and the run goes on: a curve is not worth a run.
    A service that has not taken everything CLOSE_SECONDS after the end is left behind, and noted too.
    """
    senders = [_Sender(name, run, note) for name in names]

    def send(step: int, metrics: Mapping[str, Any]) -> None:
        numbers = numbers_of(metrics)
        for sender in senders:
            sender.put((step, numbers))

    failed = True
    try:
        yield send
        failed = False
    finally:
        for sender in senders:
            sender.end(failed=failed)
        for sender in senders:
            sender.wait()


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are finite numbers: services draw nothing else."""
    found = {}
    for name, value in metrics.items():
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        with suppress(OverflowError):  # a whole number may be larger than any float
            if isinstance(value, int | float) and math.isfinite(value):
                found[name] = float(value)
    return found


class _Sender:
    """One service and its thread."""

    def __init__(self, name: str, run: TrackedRun, note: Note) -> None:
        self._name, self._run, self._note = name, run, note
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | bool] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._serve, name=f"mcore_rl-{name}", daemon=True)
        self._thread.start()

    def put(self, item: tuple[int, Mapping[str, float]] | bool) -> None:
        while True:
            try:
                return self._waiting.put_nowait(item)
            except queue.Full:
                with suppress(queue.Empty):  # the service has taken it meanwhile
                    self._waiting.get_nowait()

    def end(self, *, failed: bool) -> None:
        self.put(failed)

    def wait(self) -> None:
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._say(f"has not taken everything within {CLOSE_SECONDS:g} s")

    def _serve(self) -> None:
        try:
            service: TrackingService = {**SERVICES, **ENDPOINT}[self._name](self._run)
            for item in iter(self._waiting.get, None):
                if isinstance(item, bool):
                    return service.close(failed=item)
                service.log(*item)
        except BaseException as error:  # another's code on a thread without a caller: said, and left
            self._say(f"{type(error).__name__}: {error}")

    def _say(self, why: str) -> None:
        first = why.partition("\n")[0][:300]
        said = f"mcore-rl: {self._name} gets no more of this run: {first}"
        print(printable(said), file=sys.stderr, flush=True)
        try:
            self._note(self._name, first)
        except StorageError as error:  # of a full disk, on a thread without a caller: said, and left
            print(printable(f"mcore-rl: it could not be noted: {error}"), file=sys.stderr, flush=True)
