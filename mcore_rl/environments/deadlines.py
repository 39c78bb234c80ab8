"""The deadlines of one rollout: of the whole, and of what its environment does between two responses."""

from __future__ import annotations

import asyncio

from mcore_rl.environments.policy import RolloutLimits


class Deadlines:
    """Their clocks; `passed` is done as soon as one has run out, with what to say of it.

    While the model generates, only the clock of the whole rollout runs: servers have deadlines of their own.
    """

    def __init__(self, limits: RolloutLimits) -> None:
        self._loop, self._limits = asyncio.get_running_loop(), limits
        self.passed: asyncio.Future[str] = self._loop.create_future()
        self._whole = self._loop.call_later(limits.seconds, self._pass, "the rollout", limits.seconds)
        self._turn: asyncio.TimerHandle | None = None
        self.turn(waiting=True)

    def turn(self, *, waiting: bool) -> None:
        """Stop the clock of a turn, and start it again where the environment is waited for."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if waiting and not self.passed.done():
            seconds = self._limits.turn_seconds
            self._turn = self._loop.call_later(seconds, self._pass, "a turn of the environment", seconds)

    def close(self) -> None:
        """Stop both."""
        self._whole.cancel()
        self.turn(waiting=False)
        self.passed.cancel()

    def _pass(self, what: str, seconds: float) -> None:
        if not self.passed.done():
            self.passed.set_result(f"{what} took longer than {seconds:g} s")
