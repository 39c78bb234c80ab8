"""The order of prompts over epochs, and a replica's share of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mcore_rl.data.prompts import Fingerprint, PromptSet, fingerprint
from mcore_rl.errors import DataError
from mcore_rl.types import Prompt

T = TypeVar("T")


class PromptCursor:
    """Walks a prompt set in a shuffled order per epoch, the same on every rank and after a resume.

    Within an epoch every prompt comes exactly once. A batch that crosses into the next epoch holds no prompt
    twice: those it already has come last in the new epoch, so that group ids are unique within a rollout.
    """

    def __init__(self, data: PromptSet, seed: int) -> None:
        self._data = data
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._last: list[int] = []

    @property
    def epoch(self) -> int:
        """Epochs begun before the next prompt, from 0."""
        return self._epoch

    def next(self, count: int, takes: Callable[[Prompt, int], bool] | None = None) -> list[Prompt]:
        """The next `count` prompts over all replicas.

        Args:
            takes: whether a prompt is taken, of it and the epoch; it is passed over in this epoch if not.

        Raises DataError when there are fewer prompts than that in the set, or when fewer are taken until the
        end of the next epoch.
        """
        prompts = self._data.prompts
        if count > len(prompts):
            raise DataError(
                f"a batch of {count} prompts from a set of {len(prompts)}; lower rollout.prompts_per_step or "
                "supervised.batch_size"
            )
        taken: list[int] = []
        self._walk(taken, count, takes)
        if len(taken) < count:
            self._epoch, self._position, self._last = self._epoch + 1, 0, list(taken)
            self._walk(taken, count, takes)
        if len(taken) < count:
            raise DataError(
                f"data.curriculum takes {len(taken)} of {len(prompts)} prompts by the end of epoch "
                f"{self._epoch}, and {count} are asked at once; let it take more, or lower "
                "rollout.prompts_per_step"
            )
        return [prompts[index] for index in taken]

    def _walk(self, taken: list[int], count: int, takes: Callable[[Prompt, int], bool] | None) -> None:
        """Add to `taken` from this epoch; none that it has from the one before."""
        prompts, before = self._data.prompts, set(taken)
        for index in map(int, self._order()[self._position :] if len(taken) < count else ()):
            if len(taken) == count or index in before:
                return
            self._position += 1
            if takes is None or takes(prompts[index], self._epoch):
                taken.append(index)

    @property
    def place(self) -> tuple[int, int, list[int]]:
        """Where it stands: epoch, position in it, and the prompts that come last in it."""
        return self._epoch, self._position, self._last

    def move(self, place: tuple[int, int, list[int]]) -> None:
        """Stand at a `place` of a cursor over the same prompts."""
        self._epoch, self._position, self._last = place

    def _order(self) -> npt.NDArray[np.int64]:
        """[N] this epoch's order, with the prompts of the batch that began it last."""
        # Raw PCG64 output is stable across numpy versions; Generator.permutation is not promised to be.
        keys = np.random.PCG64([self._seed, self._epoch]).random_raw(len(self._data.prompts))
        order = np.argsort(keys, kind="stable")
        late = np.isin(order, self._last)
        return np.concatenate([order[~late], order[late]])

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        return self._data.fingerprint()

    def state(self) -> dict[str, Any]:
        """JSON-serialisable position, for a checkpoint."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "last": self._last,
            "data": asdict(self._fingerprint),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        A state of an earlier version has only the ids in it (`knows_content`): other texts or labels under
        the same ids are not seen then.

        Raises DataError when the prompts or the seed are not those of the state.
        """
        if state["seed"] != self._seed:
            raise DataError(
                f"the prompt cursor was saved with seed {state['seed']}, this run has {self._seed}; resume "
                "with the run.seed of the saved run"
            )
        what = self._changed(state)
        if what:
            raise DataError(
                f"the training prompts are not those of the saved run: {what}. Resume with the file, "
                "tokenizer and data.max_prompt_tokens that it had, or start a new run from its weights"
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._last = [int(index) for index in state["last"]]

    def _changed(self, state: Mapping[str, Any]) -> str:
        """What is different from the prompts of `state`, for people; empty where nothing is."""
        now = self._fingerprint
        if not knows_content(state):
            return "" if state["fingerprint"] == now.ids else "it has other ids, or another order or number"
        then = Fingerprint(**state["data"])
        if then == now:
            return ""
        if then.unordered == now.unordered:
            return f"the same {now.count} in another order"
        if now.count > then.count and fingerprint(self._data.prompts[: then.count]) == then:
            return f"{now.count - then.count} were appended to its {then.count}"
        if then.ids == now.ids:
            return (
                f"the same {now.count} ids with other texts, tokens, labels or metadata: the file was edited"
            )
        return f"it had {then.count}, these are {now.count} others"


def knows_content(state: Mapping[str, Any]) -> bool:
    """Whether a cursor's state says what the prompts are, and not their ids alone."""
    return "data" in state


def share(items: Sequence[T], rank: int, size: int) -> Sequence[T]:
    """Contiguous part of `rank` out of `size`: the parts hold all items once, in sizes at most 1 apart."""
    return items[rank * len(items) // size : (rank + 1) * len(items) // size]
