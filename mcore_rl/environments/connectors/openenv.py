"""Environments of the package openenv-core (0.3): one of its servers plays, a step for each turn.

    [environment]
    function = "mcore_rl.environments.connectors.openenv:play"
    args = { url = "http://127.0.0.1:8000", action = "message", observation = "text" }

A row's field `openenv`, where it has one, is what the episode is reset with, such as {"seed": 3}. The
server's rewards are those of the turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_rl.environments.policy import Policy
from mcore_rl.errors import ConfigError
from mcore_rl.rewards.outcome import Void
from mcore_rl.terminal import escaped, joined, short
from mcore_rl.types import Prompt

_KEY = "openenv"
"""of the metadata of a row, and the name of the reward's part"""


async def play(
    policy: Policy, prompt: Prompt, *, url: str, action: str, observation: str
) -> dict[str, list[float]] | Void:
    """One episode: what is observed is the user's message, the answer is the action. A reward for each turn.

    Args:
        url: of the environment's server.
        action: field of its actions that is the text of an answer.
        observation: field of its observations that the policy is shown.
    """
    try:
        from openenv.core import GenericEnvClient  # pyright: ignore[reportMissingImports]
        from websockets.exceptions import WebSocketException  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"openenv: {error}; `make openenv` installs it, for the trainer's Python") from None
    reset = prompt.metadata.get(_KEY) or {}
    if not isinstance(reset, Mapping):
        raise ConfigError(f"openenv: {short(prompt.id)}: `{_KEY}` is no object of what to reset with")
    messages: list[Mapping[str, Any]] = [*prompt.messages]
    rewards: list[float] = []
    try:
        async with GenericEnvClient(base_url=url) as env:
            step = await env.reset(**reset)
            while not step.done:
                messages.append({"role": "user", "content": _shown(step.observation, observation)})
                turn = await policy.generate(messages)
                messages.append(turn.message)
                step = await env.step({action: turn.message.get("content") or turn.text})
                rewards.append(float(step.reward or 0.0))
    except (OSError, WebSocketException) as error:
        return Void(_KEY, short(f"{url}: {type(error).__name__}: {escaped(error)}"))
    return {_KEY: rewards}


def _shown(found: Mapping[str, Any], field: str) -> str:
    if field not in found:
        known = joined(sorted(found)) or "none"
        raise ConfigError(f"environment.args.observation: {short(field)} is none of its fields: {known}")
    return str(found[field])
