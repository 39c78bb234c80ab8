"""Reward functions: loading one by name, and scoring groups with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Protocol

import numpy as np

from mcore_rl.errors import RewardError
from mcore_rl.functions import load_function
from mcore_rl.types import Group, Sample

LARGEST = float(np.finfo(np.float32).max)
"""Rewards beyond this would be infinite as soon as they enter a float32 tensor."""


class RewardFn(Protocol):
    """Scores one response. Pure: the same sample always gets the same reward."""

    def __call__(self, sample: Sample, /) -> float:
        """A finite number, higher is better, from `sample.text` (the response) and `sample.prompt.label`."""
        ...


def load_reward(name: str) -> RewardFn:
    """The function that `module:function` names; its directory is on PYTHONPATH or the current one.

    Raises ConfigError when it does not exist, its import fails, or it cannot take one sample.
    """
    return load_function("reward.function", name, "the sample")


def score_groups(groups: Sequence[Group], function: RewardFn) -> list[Group]:
    """The same groups with every sample's reward set.

    Raises RewardError, naming the sample and the function, when the function raises or returns anything but a
    finite number (bool, None, strings and tensors are refused).
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return [
        replace(group, samples=tuple(replace(s, reward=_score(s, function, name)) for s in group.samples))
        for group in groups
    ]


def _score(sample: Sample, function: RewardFn, name: str) -> float:
    try:
        reward = function(sample)
    except Exception as error:
        raise RewardError(
            f"reward {name} raised {type(error).__name__} on sample {sample.id}: {error}; "
            "handle this response in the function"
        ) from error
    if isinstance(reward, bool) or not isinstance(reward, Real):
        raise RewardError(
            f"reward {name} returned {type(reward).__name__} for sample {sample.id}; return a float"
        )
    if not -LARGEST <= reward <= LARGEST:  # NaN compares false
        what = "NaN" if reward != reward else "infinity or a number beyond float32"
        raise RewardError(f"reward {name} returned {what} for sample {sample.id}; return a finite number")
    return float(reward)
