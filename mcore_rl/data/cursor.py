"""The order of prompts over epochs, and a replica's share of a batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mcore_rl.data.fingerprint import BadRows, Fingerprint, RenderedFingerprint, fingerprint_rendered
from mcore_rl.data.prompts import PromptSet, twice
from mcore_rl.data.quota import next_part, shares_of
from mcore_rl.errors import DataError, MalformedRowError
from mcore_rl.types import Prompt

T = TypeVar("T")
Takes = Callable[[Prompt, int], bool]


class PromptCursor:
    """Walks a prompt set in a shuffled order per epoch, the same on every rank and after a resume.

    Within an epoch every prompt comes exactly once. A batch that crosses into the next epoch holds no prompt
    twice: those it already has come last in the new epoch, so that group ids are unique within a rollout.
    Over-long prompts are passed over. With weights every path of the set is walked by itself, and gives its
    exact quota.

    Args:
        weights: of the paths of `data`; none walks all of them as one.
        mended: rows that may have been mended since a state was taken.
    """

    def __init__(
        self, data: PromptSet, seed: int, weights: Sequence[float] = (), *, mended: BadRows | None = None
    ) -> None:
        self._data, self._may_be_mended = data, mended
        self._seed = seed
        self._weights = tuple(weights)
        self._shares = shares_of(weights) if weights else shares_of([1.0])
        ends = data.part_ends if weights else (len(data),)
        self._walks = [
            _Walk(range(begin, end), [seed] if part == 0 else [seed, part])
            for part, (begin, end) in enumerate(zip((0, *ends), ends, strict=False))
        ]
        self._given = [0] * len(self._walks)
        self._numbers = dict[str, int]()
        self.drawn = dict[str, Prompt]()
        """id -> prompt, of all that were drawn and not forgotten"""
        self.mended: tuple[int, ...] = ()
        """rows that are others than in the state that it continues, and may be"""
        self.passed_over = 0
        """over-long prompts that were met so far, besides those that were known"""

    @property
    def epoch(self) -> int:
        """Epochs begun before the next prompt, from 0; of a mixture, those of its first path."""
        return self._walks[0].epoch

    def next(self, count: int, takes: Takes | None = None) -> list[Prompt]:
        """The next `count` prompts over all replicas.

        Args:
            takes: whether a prompt is taken, of it and the epoch; it is passed over in this epoch if not.

        Raises:
            DataError: there are fewer prompts than that, or fewer are taken until the end of the next epoch;
                a row is malformed, or two of those that are drawn have one id.
        """
        if count > len(self._data):
            raise DataError(
                f"a batch of {count} prompts from a set of {len(self._data)}; lower rollout.prompts_per_step "
                "or supervised.batch_size"
            )
        for walk in self._walks:
            walk.begin_batch()
        return [self._next(takes, count) for _ in range(count)]

    def _next(self, takes: Takes | None, count: int) -> Prompt:
        part = next_part(self._shares, self._given) if self._weights else 0
        found = self._usable(self._walks[part], takes)
        if found is None:
            raise DataError(self._too_few(self._walks[part], count, chosen=takes is not None))
        number, prompt = found
        known = self._numbers.setdefault(prompt.id, number)
        if known != number:
            said = twice(self._data.place(number), "id", prompt.id, self._data.place(known))
            raise MalformedRowError(str(said), self._data.row(number))
        self._walks[part].take(number)
        self._given[part] += 1
        self.drawn[prompt.id] = prompt
        return prompt

    def _usable(self, walk: _Walk, takes: Takes | None) -> tuple[int, Prompt] | None:
        """The next prompt of a walk that is not over-long and is taken, and its number; None without one."""
        while (number := walk.next()) is not None:
            prompt = self._data.find(number)
            if prompt is None:
                self.passed_over += 1
            elif takes is None or takes(prompt, walk.epoch):
                return number, prompt
        return None

    def _too_few(self, walk: _Walk, count: int, *, chosen: bool) -> str:
        place = self._data.place(walk.numbers.start)
        if chosen:
            where = f" of {place} and on" if self._weights else ""
            return (
                f"data.curriculum takes {walk.in_batch} of {len(walk.numbers)} prompts{where} by the end of "
                f"epoch {walk.epoch}, and {count} are asked at once; let it take more, or lower "
                "rollout.prompts_per_step"
            )
        return (
            f"{place}: from here on there are fewer usable prompts than a batch takes; lower "
            "rollout.prompts_per_step or supervised.batch_size, or give more prompts"
        )

    def keep(self, ids: Collection[str]) -> None:
        """Forget the prompts that were drawn, but for these."""
        self.drawn = {name: self.drawn[name] for name in ids if name in self.drawn}
        self._numbers = {name: self._numbers[name] for name in self.drawn}

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands, as JSON: the position in every walk, and which prompts are remembered."""
        first, *others = [walk.state() for walk in self._walks]
        return {
            **first,
            "others": others,
            "given": list(self._given),
            "drawn": dict(self._numbers),
            "passed_over": self.passed_over,
        }

    def move(self, place: Mapping[str, Any]) -> None:
        """Stand at a `place` of a cursor over the same prompts with the same weights.

        Raises:
            DataError: a row that was drawn there is malformed now.
        """
        for walk, its in zip(self._walks, [place, *place["others"]], strict=True):
            walk.restore(its)
        self._given = [int(count) for count in place["given"]]
        self.passed_over = int(place["passed_over"])
        self._remember({name: int(number) for name, number in place["drawn"].items()})

    def _remember(self, numbers: Mapping[str, int]) -> None:
        """The prompts of these numbers are drawn, those that are new read now."""
        found = {
            name: self.drawn[name] if self._numbers.get(name) == number else self._data.find(number)
            for name, number in numbers.items()
        }
        self.drawn = {name: prompt for name, prompt in found.items() if prompt is not None}
        self._numbers = {name: numbers[name] for name in self.drawn}

    def state(self) -> dict[str, Any]:
        """JSON-serialisable position, for a checkpoint."""
        weights, data = list(self._weights), asdict(self._data.fingerprint)
        return {"seed": self._seed, **self.place, "weights": weights, "data": data}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        A state of an earlier version is compared by what it has: the prompts as they were rendered, or their
        ids alone (`knows_content`): other texts or labels under the same ids are not seen then.

        Raises:
            DataError: the prompts or the seed are not those of the state.
        """
        if state["seed"] != self._seed:
            raise DataError(
                f"the prompt cursor was saved with seed {state['seed']}, this run has {self._seed}; resume "
                "with the run.seed of the saved run"
            )
        known = "form" in state.get("data", {})
        what = self._changed(Fingerprint(**state["data"])) if known else self._changed_since_earlier(state)
        if what:
            raise DataError(
                f"the training prompts are not those of the saved run: {what}. Resume with the file, "
                "tokenizer and data.max_prompt_tokens that it had, or start a new run from its weights"
            )
        parts = 1 + len(state.get("others", []))
        if parts != len(self._walks):
            raise DataError(
                f"the saved run walked {parts} parts of its data, this one {len(self._walks)}; resume with "
                "data.weights as it had it, or start a new run from its weights"
            )
        begun = self.place  # with what an earlier version does not say
        if list(self._weights) != state.get("weights", []):  # other weights count from here
            state = {**state, "given": begun["given"]}
        self.move({**begun, **state})

    def _changed(self, then: Fingerprint) -> str:
        """What is different from the rows of `then`, for people; empty where nothing is."""
        now = self._data.fingerprint
        if then == now:
            return ""
        if self._is_mended(then, now):
            return ""
        if then.content == now.content:
            return (
                f"the same {now.count} in another form: the tokenizer, its chat template or a key of [data] "
                "is another one"
            )
        if then.unordered == now.unordered:
            return f"the same {now.count} in another order"
        if now.count > then.count and self._data.beginning(then.count).content == then.content:
            return f"{now.count - then.count} were appended to its {then.count}"
        if then.count == now.count:
            return f"as many, {now.count}, but others or with other values: the file was edited or replaced"
        return f"it had {then.count}, these are {now.count} others"

    def _is_mended(self, then: Fingerprint, now: Fingerprint) -> bool:
        """Whether nothing but rows that were malformed is another than in `then`."""
        noted = self._may_be_mended
        if noted is None or (then.count, then.form) != (now.count, now.form):
            return False
        if then.content not in noted.contents or self._data.around(noted.rows) != noted.around:
            return False
        self.mended = noted.rows
        return True

    def _changed_since_earlier(self, state: Mapping[str, Any]) -> str:
        """The same for a state of an earlier version; renders all prompts, and keeps those as drawn."""
        prompts = {number: self._data.find(number) for number in range(len(self._data))}
        if None in prompts.values():
            return "over-long ones are beyond what was examined at the start; take them out of the file"
        kept = [prompt for prompt in prompts.values() if prompt is not None]
        self.drawn = {prompt.id: prompt for prompt in kept}
        self._numbers = {prompt.id: number for number, prompt in enumerate(kept)}
        now = fingerprint_rendered(kept)
        if not knows_content(state):
            return "" if state["fingerprint"] == now.ids else "it has other ids, or another order or number"
        then = RenderedFingerprint(**state["data"])
        if then == now:
            return ""
        if then.ids == now.ids:
            return (
                f"the same {now.count} ids with other texts, tokens, labels or metadata: the file was edited"
            )
        return f"it had {then.count}, these are {now.count} others"


class _Walk:
    """The order of some prompts over epochs."""

    def __init__(self, numbers: range, seed: Sequence[int]) -> None:
        self.numbers = numbers
        self.epoch = 0
        self._seed, self._position = seed, 0
        self._last: list[int] = []
        self._taken: list[int] = []
        self._begins_in = 0
        """the epoch in which the batch begins"""
        self._order: npt.NDArray[np.int64] | None = None

    def begin_batch(self) -> None:
        """What is taken from now on is one batch."""
        self._taken, self._begins_in = [], self.epoch + (self._position == len(self.numbers))

    def take(self, number: int) -> None:
        """This one is in the batch."""
        self._taken.append(number - self.numbers.start)

    def next(self) -> int | None:
        """The number of the next prompt; None where the batch has all of this epoch and the next."""
        if self._position == len(self.numbers):
            if self.epoch > self._begins_in:
                return None
            self.epoch, self._position, self._last, self._order = self.epoch + 1, 0, [*self._taken], None
        if self._order is None:
            self._order = self._shuffled()
        index = int(self._order[self._position])
        if self._last and index in self._taken:
            return None
        self._position += 1
        return self.numbers.start + index

    @property
    def in_batch(self) -> int:
        """Prompts that the batch has."""
        return len(self._taken)

    def _shuffled(self) -> npt.NDArray[np.int64]:
        """[N] this epoch's order, with the prompts of the batch that began it last."""
        # Raw PCG64 output is stable across numpy versions; Generator.permutation is not promised to be.
        keys = np.random.PCG64([self._seed[0], self.epoch, *self._seed[1:]]).random_raw(len(self.numbers))
        order = np.argsort(keys, kind="stable")
        late = np.isin(order, self._last)
        return np.concatenate([order[~late], order[late]])

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self._position, "last": self._last}

    def restore(self, state: Mapping[str, Any]) -> None:
        epoch, last = int(state["epoch"]), [int(index) for index in state["last"]]
        if (epoch, last) != (self.epoch, self._last):
            self._order = None
        self.epoch, self._position, self._last = epoch, int(state["position"]), last


def knows_content(state: Mapping[str, Any]) -> bool:
    """Whether a cursor's state says what the prompts are, and not their ids alone."""
    return "data" in state


def share(items: Sequence[T], rank: int, size: int) -> Sequence[T]:
    """Contiguous part of `rank` out of `size`: the parts hold all items once, in sizes at most 1 apart."""
    return items[rank * len(items) // size : (rank + 1) * len(items) // size]
