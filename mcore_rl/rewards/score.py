"""What a reward function is, and loading one by name."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from mcore_rl.errors import ConfigError
from mcore_rl.functions import find_function, load_function
from mcore_rl.rewards.outcome import Returned
from mcore_rl.rewards.task import RewardFunction
from mcore_rl.terminal import escaped
from mcore_rl.types import Group


class RewardFn(Protocol):
    """Scores one response, or a group of them where its parameter is called `group`.

    It may be async. Pure: the same sample always gets the same reward.
    """

    def __call__(self, sample: Any, /) -> Returned | Sequence[Returned] | Awaitable[Any]:
        """A finite number, higher is better, from `sample.text` (the response) and `sample.prompt.label`.

        Or one per turn, or several parts, or Void: see outcome.py. Of a group: a list, one for each sample.
        """
        ...


def load_reward(
    name: str, key: str = "reward.function", arguments: Mapping[str, Any] | None = None
) -> RewardFn:
    """The function that `module:function` names; its directory is on PYTHONPATH or the current one.

    Args:
        key: of the configuration, in which it is named.
        arguments: keyword arguments of every call; None: it takes none but the sample.

    Raises:
        ConfigError: it does not exist, its import fails (or ends with sys.exit), or it cannot take one
            sample and these arguments.
    """
    if arguments is None:
        return load_function(key, name, "the sample")
    function = find_function(key, name)
    place = key.removesuffix(".function")
    try:
        inspect.signature(function).bind(None, **arguments)
    except TypeError as error:  # it cannot be called at all, too
        what = f"{name} cannot be called with a sample and these ({escaped(error)})"
        raise ConfigError(f"{place}.args: {what}; name its keyword arguments") from None
    except ValueError:  # a built-in without a signature: the first call will tell
        pass
    return partial(function, **arguments)


def load_rewards(functions: Sequence[RewardFunction]) -> list[RewardFn]:
    """Each of them; raises as load_reward."""
    return [load_reward(one.function, one.key, one.arguments) for one in functions]


def takes_group(function: Callable[..., Any]) -> bool:
    """Whether a reward function is one of a whole group: its parameter is called so, or annotated so."""
    try:
        (first, *_) = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return False
    return first.name == "group" or first.annotation in (Group, "Group")
