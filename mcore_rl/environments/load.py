"""Loading an environment by its name, and how it reads what the model says."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from transformers.utils.chat_parsing.response_templates import load_response_template

from mcore_rl.environments.policy import Policy
from mcore_rl.environments.sessions import SessionClass
from mcore_rl.errors import ConfigError
from mcore_rl.functions import find_function
from mcore_rl.rewards.outcome import Returned
from mcore_rl.terminal import escaped
from mcore_rl.types import Prompt

_KEY = "environment.function"


class EnvironmentFn(Protocol):
    """Makes one rollout: asks the policy as often as it likes, and says what that was worth."""

    def __call__(self, policy: Policy, prompt: Prompt, /) -> Awaitable[Returned | None]:
        """What a reward function may return (a number, one per turn, parts, Void: rewards/outcome.py).

        None leaves the reward to the run's reward function, for which `sample.text` is the last response.
        """
        ...


def load_environment(name: str, arguments: Mapping[str, Any]) -> EnvironmentFn | SessionClass:
    """The function or class that `module:function` names; its directory is on PYTHONPATH or the current one.

    Raises:
        ConfigError: it does not exist, its import fails, it is not async, or it cannot take a policy, a
            prompt and these arguments.
    """
    function: Callable[..., Any] = find_function(_KEY, name)
    if inspect.isclass(function):
        return _load_class(name, function, arguments)
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f"{_KEY}: {name} is no async function; write `async def` of policy and prompt")
    try:
        inspect.signature(function).bind(None, None, **arguments)
    except TypeError as error:
        what = f"{name} cannot be called with a policy, a prompt and these ({escaped(error)})"
        raise ConfigError(f"environment.args: {what}; name its keyword arguments") from None
    return partial(function, **arguments)


def _load_class(name: str, found: type, arguments: Mapping[str, Any]) -> SessionClass:
    if not inspect.iscoroutinefunction(getattr(found, "rollout", None)):
        raise ConfigError(
            f"{_KEY}: {name} has no async rollout; write `async def rollout(self, policy, prompt)`"
        )
    if hasattr(found, "state") != hasattr(found, "restore"):
        raise ConfigError(f"{_KEY}: {name} has one of state and restore; write both, or neither")
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError as error:
        what = f"{name} cannot be made of these ({escaped(error)})"
        raise ConfigError(f"environment.args: {what}; name its keyword arguments") from None
    return SessionClass(found, arguments)


def load_response(path: Path | None, own: Any) -> Mapping[str, Any] | None:
    """The response template of the file at `path`, or the tokenizer's `own`, if it has one.

    Raises:
        ConfigError: there is no such file, or transformers' parser does not take what it holds.
    """
    if path is None:
        return own
    place = f"environment.response_template: {path}"
    try:
        template = json.loads(path.read_text(encoding="utf-8"))
        load_response_template(template)
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror}; check the path") from None
    except Exception as error:  # whatever the parser makes of a file that is none
        raise ConfigError(
            f"{place}: {escaped(error)}; write a response template of transformers' parse_response"
        ) from None
    return template
