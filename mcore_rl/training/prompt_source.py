"""The prompts that come next, the same on every rank."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mcore_rl.data.curriculum import Curriculum
from mcore_rl.data.cursor import PromptCursor
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.types import Group, Prompt


class PromptSource:
    """The cursor's order, from which a curriculum chooses where there is one.

    The curriculum's function is the user's and need not say the same on two ranks: the main rank asks it.
    """

    def __init__(self, mesh: Mesh, cursor: PromptCursor, curriculum: Curriculum | None) -> None:
        self._mesh, self._cursor, self._curriculum = mesh, cursor, curriculum

    @property
    def prompts(self) -> Mapping[str, Prompt]:
        """Id -> prompt, of all that were drawn and not forgotten."""
        return self._cursor.drawn

    def keep(self, ids: Collection[str]) -> None:
        """Forget the prompts that were drawn, but for these; every rank calls it with the same."""
        self._cursor.keep(ids)

    def next(self, count: int, step: int) -> list[Prompt]:
        """Return `count` different prompts, to be asked in `step`; collective.

        Raises:
            DataError, ConfigError: on every rank; see PromptCursor.next and Curriculum.takes.
        """
        curriculum = self._curriculum
        if curriculum is None or not count:
            return self._cursor.next(count)

        def choose() -> tuple[list[str], Any]:
            chosen = self._cursor.next(count, curriculum.takes(step))
            return [prompt.id for prompt in chosen], self._cursor.place

        ids, place = on_main(self._mesh, choose)
        self._cursor.move(place)  # which draws them on the other ranks
        return [self.prompts[id] for id in ids]

    def measure(self, groups: Iterable[Group]) -> None:
        """Hand what was sampled, with its rewards, to the curriculum."""
        if self._curriculum is not None:
            self._curriculum.measure(groups)

    def state(self) -> dict[str, Any]:
        """What the curriculum knows, as JSON; the cursor is a part of the checkpoint by itself."""
        return {} if self._curriculum is None else self._curriculum.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from it."""
        if self._curriculum is not None:
            self._curriculum.restore(state)
