"""Environments of the tests, which the ranks import by name."""

from __future__ import annotations

import asyncio
from typing import Any


class AsksAgain:
    """Puts a question behind every answer; the last turn begins anew, as where a context is compacted.

    It thinks for `pause` seconds behind each answer, so that a checkpoint comes while it plays.
    """

    def __init__(self, *, turns: int, pause: float = 0.0) -> None:
        self.turns, self.pause = turns, pause
        self.ids: list[int] = []
        self.digits: list[float] = []

    async def rollout(self, policy, prompt):
        self.ids = self.ids or [*prompt.token_ids]
        while len(self.digits) < self.turns - 1:
            turn = await policy.generate(self.ids, max_new_tokens=6)
            await asyncio.sleep(self.pause)
            self.ids = [*turn.prompt_ids, *turn.token_ids, *policy.encode("+1=")]
            self.digits.append(float(sum(character.isdigit() for character in turn.text)))
        turn = await policy.generate([*prompt.token_ids, *policy.encode("=")], max_new_tokens=6)
        return {"digits": [*self.digits, 0.0], "brief": -0.01 * len(turn.token_ids)}

    def state(self) -> dict[str, Any]:
        return {"ids": self.ids, "digits": self.digits}

    def restore(self, state: dict[str, Any]) -> None:
        self.ids, self.digits = state["ids"], state["digits"]
