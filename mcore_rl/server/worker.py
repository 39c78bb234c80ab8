"""The engine thread: owns the Engine, steps it while there is work, and runs commands between steps."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from mcore_rl.server.engine import Engine, PauseMode
from mcore_rl.server.schema import RequestError
from mcore_rl.server.sequence import Sequence

T = TypeVar("T")
Tell = Callable[[Sequence, tuple[list[int], list[float]] | None], None]
"""is told of a sequence, on the engine's thread: its ids and log-probs until now; None when it has ended"""
_IDLE_SECONDS = 1.0


@dataclass(frozen=True)
class EngineState:
    """What the engine thread was at after its last step or command."""

    version: str
    running: int
    waiting: int
    used_tokens: int
    """in the cache"""


@dataclass
class _Command:
    run: Callable[[], Any]
    future: Future[Any]
    quiet: bool = False
    """To be run only while no sequence decodes."""


@dataclass(eq=False)
class _Ticket:
    """One HTTP request: resolved when its last sequence has left the engine."""

    sequences: list[Sequence]
    remaining: int
    future: Future[list[Sequence]]
    tell: Tell | None = None


class Worker:
    """Every method but `close` returns at once with a future, and may be called from any thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._tickets: dict[Sequence, _Ticket] = {}
        self._held: list[_Command] = []
        """Commands that wait for quiet; nothing is admitted meanwhile, so that quiet comes."""
        self._waits = True
        """for something to do"""
        self.state = self._state()
        """to be read from any thread, at once"""
        self._thread = threading.Thread(target=self._loop, name="mcore_rl-engine", daemon=True)
        self._thread.start()

    def call(self, run: Callable[[Engine], T], *, quiet: bool = False) -> Future[T]:
        """Runs `run(engine)` between two steps; with `quiet`, when generation is paused or nothing runs."""
        future: Future[T] = Future()
        self._commands.put(_Command(lambda: run(self.engine), future, quiet))
        return future

    def generate(self, sequences: list[Sequence], tell: Tell | None = None) -> Future[list[Sequence]]:
        """Resolves to `sequences`, all finished; RequestError when one of their rids is in flight.

        Args:
            tell: of those that want to be streamed, while they are sampled, and when they have ended.
        """
        future: Future[list[Sequence]] = Future()
        accepted = self.call(lambda _: self._submit(sequences, future, tell))
        accepted.add_done_callback(lambda done: _relay_error(done, future))
        return future

    def abort(self, match: Callable[[Sequence], bool]) -> Future[int]:
        """Ends matching sequences; resolves to their number. Their partial output is delivered as usual."""
        return self.call(lambda engine: self._deliver(engine.abort(match)))

    def pause(self, mode: PauseMode) -> Future[int]:
        """See `Engine.pause`; resolves to the number of aborted sequences."""
        return self.call(lambda engine: self._deliver(engine.pause(mode)))

    @property
    def stalled(self) -> float:
        """Seconds since the engine thread last got on with its work; 0 without any, inf when it is dead.

        To be read from any thread, at once.
        """
        if not self._thread.is_alive():
            return math.inf
        return 0.0 if self._waits else time.monotonic() - self.engine.moved

    def close(self, timeout: float) -> None:
        """Ends the thread after its present step; what is in flight is cancelled."""
        self._commands.put(None)
        self._thread.join(timeout)

    # -- the engine thread --------------------------------------------------------------------------------

    def _state(self) -> EngineState:
        engine = self.engine
        return EngineState(engine.version, len(engine.running), len(engine.waiting), engine.used_tokens)

    def _execute(self, command: _Command) -> None:
        if not command.future.set_running_or_notify_cancel():
            return
        try:
            result = command.run()
            self.state = self._state()
            command.future.set_result(result)
        except Exception as error:  # the caller decides what it means
            command.future.set_exception(error)

    def _loop(self) -> None:
        while self._run_commands():
            if self._quiet:
                for command in self._held:
                    self._execute(command)
                self._held.clear()
            if self._has_work:
                self._step()
        for ticket in self._tickets.values():
            ticket.future.cancel()

    @property
    def _quiet(self) -> bool:
        return self.engine.paused or not self.engine.running

    @property
    def _has_work(self) -> bool:
        return not self.engine.paused and bool(self.engine.running or self.engine.waiting)

    def _run_commands(self) -> bool:
        """Runs what is queued, after waiting for it when there is no other work. False: closed."""
        wait = not self._has_work
        while True:
            try:
                command = self._wait() if wait else self._commands.get_nowait()
            except queue.Empty:
                return True
            self.engine.moved = time.monotonic()
            if command is None:
                return False
            wait = False
            if command.quiet and not self._quiet:
                self._held.append(command)
            else:
                self._execute(command)

    def _wait(self) -> _Command | None:
        self._waits = True
        try:
            return self._commands.get(timeout=_IDLE_SECONDS)
        finally:
            self.engine.moved = time.monotonic()
            self._waits = False

    def _step(self) -> None:
        self.engine.moved = time.monotonic()
        try:
            self._deliver(self.engine.step(admit=not self._held))
            self._tell_running()
        except Exception as error:  # a failed forward costs the requests in flight, not the server
            self.engine.clear()
            for ticket in set(self._tickets.values()):
                if not ticket.future.done():
                    ticket.future.set_exception(error)
            self._tickets.clear()
            self.state = self._state()

    def _tell_running(self) -> None:
        for sequence, sampled in self.engine.sampled():
            ticket = self._tickets[sequence]
            if ticket.tell is not None:
                ticket.tell(sequence, sampled)

    def _submit(self, sequences: list[Sequence], future: Future[list[Sequence]], tell: Tell | None) -> None:
        in_flight = {sequence.rid for sequence in self._tickets}
        for sequence in sequences:
            if sequence.rid in in_flight:
                raise RequestError(
                    f"rid {sequence.rid!r} is already in flight; abort it first or choose another"
                )
        ticket = _Ticket(sequences, len(sequences), future, tell)
        self._tickets |= dict.fromkeys(sequences, ticket)
        self.engine.submit(sequences)

    def _deliver(self, finished: list[Sequence]) -> int:
        self.state = self._state()
        for sequence in finished:
            ticket = self._tickets.pop(sequence)
            ticket.remaining -= 1
            if ticket.tell is not None:
                ticket.tell(sequence, None)
            if not ticket.remaining and not ticket.future.done():
                ticket.future.set_result(ticket.sequences)
        return len(finished)


def _relay_error(source: Future[None], target: Future[Any]) -> None:
    error = source.exception()
    if error is not None and not target.done():
        target.set_exception(error)
