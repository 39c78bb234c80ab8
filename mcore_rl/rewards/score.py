"""What a reward function is, and loading one by name."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from mcore_rl.functions import load_function
from mcore_rl.rewards.outcome import Returned


class RewardFn(Protocol):
    """Scores one response, or a group of them where its parameter is called `group`.

    It may be async. Pure: the same sample always gets the same reward.
    """

    def __call__(self, sample: Any, /) -> Returned | Sequence[Returned] | Awaitable[Any]:
        """A finite number, higher is better, from `sample.text` (the response) and `sample.prompt.label`.

        Or one per turn, or several parts, or Void: see outcome.py. Of a group: a list, one for each sample.
        """
        ...


def load_reward(name: str, key: str = "reward.function") -> RewardFn:
    """The function that `module:function` names; its directory is on PYTHONPATH or the current one.

    Args:
        key: of the configuration, in which it is named.

    Raises:
        ConfigError: it does not exist, its import fails (or ends with sys.exit), or it cannot take one
            sample.
    """
    return load_function(key, name, "the sample")
