"""Reward functions: loading one by name, and scoring groups with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from mcore_rl.errors import AskedToLeave, RewardError
from mcore_rl.functions import load_function
from mcore_rl.rewards.outcome import Outcome, Returned, read_outcome
from mcore_rl.terminal import printable
from mcore_rl.types import Group, Sample

EXIT_COPY = 1
"""what a process ends with that a reward function forked and let go"""


class RewardFn(Protocol):
    """Scores one response. Pure: the same sample always gets the same reward."""

    def __call__(self, sample: Sample, /) -> Returned:
        """A finite number, higher is better, from `sample.text` (the response) and `sample.prompt.label`.

        Or one per turn, or several parts: see outcome.py.
        """
        ...


def load_reward(name: str) -> RewardFn:
    """The function that `module:function` names; its directory is on PYTHONPATH or the current one.

    Raises ConfigError when it does not exist, its import fails (or ends with sys.exit), or it cannot take one
    sample.
    """
    return load_function("reward.function", name, "the sample")


def score_groups(
    groups: Sequence[Group], function: RewardFn, weights: Mapping[str, float] | None = None
) -> list[Group]:
    """The same groups with every sample's reward set.

    Raises RewardError, naming the sample and the function, when the function raises anything, SystemExit and
    KeyboardInterrupt included, or returns anything that outcome.py does not name (bool, None, strings and
    tensors are refused, and numbers that are not finite). A process that the function has forked never
    returns from here.

    Args:
        weights: part of the reward -> its weight in the sum; 1 where it is not named.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)

    def scored(sample: Sample) -> Sample:
        found = _score(sample, function, name, weights or {})
        return replace(sample, reward=found.reward, parts=found.parts, turn_rewards=found.turn_rewards)

    return [replace(group, samples=tuple(map(scored, group.samples))) for group in groups]


def _score(sample: Sample, function: RewardFn, name: str, weights: Mapping[str, float]) -> Outcome:
    process = os.getpid()
    try:
        reward = function(sample)
    except BaseException as error:
        _end_copy(process, name, sample, error)
        if isinstance(error, AskedToLeave):
            raise  # by the operator, not by the function
        raise RewardError(
            f"reward {name} raised {type(error).__name__} on sample {sample.id}: {error}; "
            "handle this response in the function"
        ) from error
    _end_copy(process, name, sample)
    try:
        return read_outcome(reward, sample, weights)
    except RewardError as error:
        what, _, remedy = str(error).partition(";")
        raise RewardError(f"reward {name} returned {what} for sample {sample.id};{remedy}") from None


def _end_copy(process: int, name: str, sample: Sample, error: BaseException | None = None) -> None:
    """Does not return in a process that the function forked, which would go on to train as a copy of it.

    The copy must not clean up either: servers, groups and files belong to the original.
    """
    if os.getpid() == process:
        return
    if isinstance(error, SystemExit):  # what a forked process is meant to do
        os._exit(error.code if isinstance(error.code, int) else int(error.code is not None))
    text = (
        f"mcore-rl: reward {name} forked on sample {sample.id}, and the new process came back from it; it is "
        "ended here. End it in the function, with os._exit"
    )
    print(printable(text), file=sys.stderr, flush=True)
    os._exit(EXIT_COPY)
