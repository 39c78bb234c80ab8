"""Reward functions: loading one by name, and scoring groups with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Protocol

import numpy as np

from mcore_rl.errors import AskedToLeave, RewardError
from mcore_rl.functions import load_function
from mcore_rl.terminal import printable
from mcore_rl.types import Group, Sample

EXIT_COPY = 1
"""what a process ends with that a reward function forked and let go"""
LARGEST = float(np.finfo(np.float32).max)
"""Rewards beyond this would be infinite as soon as they enter a float32 tensor."""


class RewardFn(Protocol):
    """Scores one response. Pure: the same sample always gets the same reward."""

    def __call__(self, sample: Sample, /) -> float:
        """A finite number, higher is better, from `sample.text` (the response) and `sample.prompt.label`."""
        ...


def load_reward(name: str) -> RewardFn:
    """The function that `module:function` names; its directory is on PYTHONPATH or the current one.

    Raises ConfigError when it does not exist, its import fails (or ends with sys.exit), or it cannot take one
    sample.
    """
    return load_function("reward.function", name, "the sample")


def score_groups(groups: Sequence[Group], function: RewardFn) -> list[Group]:
    """The same groups with every sample's reward set.

    Raises RewardError, naming the sample and the function, when the function raises anything, SystemExit and
    KeyboardInterrupt included, or returns anything but a finite number (bool, None, strings and tensors are
    refused). A process that the function has forked never returns from here.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return [
        replace(group, samples=tuple(replace(s, reward=_score(s, function, name)) for s in group.samples))
        for group in groups
    ]


def _score(sample: Sample, function: RewardFn, name: str) -> float:
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
    if isinstance(reward, bool) or not isinstance(reward, Real):
        raise RewardError(
            f"reward {name} returned {type(reward).__name__} for sample {sample.id}; return a float"
        )
    if not -LARGEST <= reward <= LARGEST:  # NaN compares false
        what = "NaN" if reward != reward else "infinity or a number beyond float32"
        raise RewardError(f"reward {name} returned {what} for sample {sample.id}; return a finite number")
    return float(reward)


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
