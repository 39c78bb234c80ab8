"""Which prompts are sampled: a function of the user's chooses among them, by what was measured of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

from mcore_rl.errors import AskedToLeave, ConfigError, DamagedCheckpointError
from mcore_rl.functions import load_function
from mcore_rl.terminal import short
from mcore_rl.types import Group, Prompt
from mcore_rl.user_code import place, said


@dataclass(frozen=True)
class Candidate:
    """A prompt whose turn it is in the epoch's order."""

    prompt: Prompt
    step: int
    """in which it would be asked"""
    epoch: int
    """from 0"""
    rewards: tuple[float, ...]
    """mean reward of each of its groups so far, oldest first, those without a signal among them"""


class CurriculumFn(Protocol):
    """Says whether a prompt is sampled in this epoch. Pure, as a reward function is."""

    def __call__(self, candidate: Candidate, /) -> float:
        """A chance from 0 (not in this epoch) to 1 (now); True and False are 1 and 0."""
        ...


def load_curriculum(name: str) -> CurriculumFn:
    """The function that `module:function` names. Raises ConfigError as functions.load_function does."""
    return load_function("data.curriculum", name, "the candidate")


class Curriculum:
    """A function that chooses, and what was measured for it, which a checkpoint holds.

    Args:
        name: of the function, for messages.
        seed: the run's; the chance of a prompt is drawn by it, the epoch and the prompt's id.
    """

    def __init__(self, name: str, function: CurriculumFn, seed: int) -> None:
        self.name = name
        self._function, self._seed = function, seed
        self._rewards: dict[str, tuple[float, ...]] = {}
        """prompt id -> mean reward of each of its groups"""

    def takes(self, step: int) -> Callable[[Prompt, int], bool]:
        """Whether a prompt is sampled when its turn comes in an epoch, as PromptCursor.next asks.

        It raises ConfigError, naming prompt and function, when the function raises anything or returns
        anything but a number from 0 to 1.
        """

        def decide(prompt: Prompt, epoch: int) -> bool:
            candidate = Candidate(prompt, step, epoch, self._rewards.get(prompt.id, ()))
            return self._chance(candidate) > uniform(f"{self._seed}:{epoch}:{prompt.id}")

        return decide

    def _chance(self, candidate: Candidate) -> float:
        where = f"data.curriculum: {self.name}, of prompt {short(candidate.prompt.id)}"
        try:
            chance = self._function(candidate)
        except AskedToLeave:
            raise  # by the operator, not by the function
        except BaseException as error:  # SystemExit too
            raise ConfigError(
                f"{where}, raised {type(error).__name__}: {short(said(error))}{place(error)}; "
                "fix the function"
            ) from error
        if not isinstance(chance, Real) or not 0 <= chance <= 1:  # type: ignore[operator]  # NaN compares false
            raise ConfigError(f"{where}, returned {short(chance)}; return a number from 0 to 1")
        return float(chance)

    def measure(self, groups: Iterable[Group]) -> None:
        """These were sampled and have their rewards; void samples do not count."""
        for group in groups:
            live = [sample for sample in group.samples if not sample.void]
            if live:
                mean = sum(sample.reward or 0.0 for sample in live) / len(live)
                prompt = live[0].prompt.id
                self._rewards[prompt] = (*self._rewards.get(prompt, ()), mean)

    def state(self) -> dict[str, Any]:
        """The rewards of every prompt so far, as JSON."""
        return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises DamagedCheckpointError, on every rank, where it is none."""
        try:
            self._rewards = {str(prompt): tuple(map(float, rewards)) for prompt, rewards in state.items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise DamagedCheckpointError(
                "what the checkpoint holds for data.curriculum is not mean rewards of prompts; go on from "
                "--resume previous"
            ).on_every_rank() from error


def uniform(key: str) -> float:
    """A number in [0, 1) that follows from `key` alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest()) / 2**48
