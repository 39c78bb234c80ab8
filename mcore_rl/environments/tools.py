"""An environment of tools: the model calls plain Python functions until it answers without a call.

    [environment]
    function = "mcore_rl.environments.tools:call_tools"
    args = { tools = ["my_tools:search", "my_tools:calculate"] }

It returns no reward: the run's reward function scores the last response. The functions run in the trainer's
process, with its rights: what a model wrote is theirs to distrust.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from mcore_rl.environments.policy import Policy
from mcore_rl.errors import ConfigError
from mcore_rl.functions import find_function
from mcore_rl.terminal import escaped, joined, short
from mcore_rl.types import Prompt

MOST_CALLS = 32
"""in one turn; the others get an error"""
CALL_TOOLS = f"{__name__}:call_tools"
"""`environment.function` of this environment"""
_PLACE = "environment.args.tools"


@dataclass(frozen=True)
class Toolbox:
    """Functions by their names, and the JSON schemas that a chat template shows to the model."""

    functions: Mapping[str, Callable[..., Any]]
    schemas: Sequence[Mapping[str, Any]]

    async def call(self, call: Mapping[str, Any], seconds: float, most: int) -> dict[str, Any]:
        """The tool's message for one call of the model; an error is text, too.

        Args:
            seconds: until it must have answered. A function that is not async goes on in its thread.
            most: characters of the answer; what is beyond is cut, and said.
        """
        name = call["function"]["name"]
        text = await self._answer(name, call["function"].get("arguments") or {}, seconds)
        if len(text) > most:
            text = f"{text[:most]}... ({len(text) - most} characters more)"
        its = {"tool_call_id": call["id"]} if "id" in call else {}
        return {"role": "tool", "name": name, "content": text, **its}

    async def _answer(self, name: str, arguments: Mapping[str, Any], seconds: float) -> str:
        function = self.functions.get(name)
        if function is None:
            known = joined(self.functions) or "none"
            return f"Error: there is no tool {short(name)}; the tools are: {known}"
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            return f"Error: {escaped(error)}"
        try:
            async with asyncio.timeout(seconds):
                if inspect.iscoroutinefunction(function):
                    return as_text(await function(**arguments))
                return as_text(await asyncio.to_thread(function, **arguments))
        except TimeoutError:
            return f"Error: no answer within {seconds:g} s"
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # SystemExit too: it is the model that should hear of it
            return f"Error: {type(error).__name__}: {escaped(error)}"


def as_text(answer: Any) -> str:
    """A string as it is, anything else as JSON, or as Python writes it where JSON cannot."""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)


def load_tools(names: Sequence[str]) -> Toolbox:
    """The functions that `module:function` name, with schemas from their signatures and docstrings.

    Raises:
        ConfigError: the names are no list of strings, or one does not exist, has the name of another, or its
            signature makes no schema: every argument needs a type, and a line under `Args:` in the docstring.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'{_PLACE}: {short(str(names))} is no list; write ["module:function", ...]')
    return _loaded(tuple(names))


@lru_cache(maxsize=16)
def _loaded(names: tuple[str, ...]) -> Toolbox:
    functions: dict[str, Callable[..., Any]] = {}
    schemas = []
    for name in names:
        function = find_function(_PLACE, name)
        try:
            schema = get_json_schema(function)
        except Exception as error:  # of transformers, for whatever it cannot read
            raise ConfigError(
                f"{_PLACE}: {name} has no schema ({escaped(error)}); give every argument a type, and a line "
                "under `Args:` in the docstring"
            ) from None
        called = schema["function"]["name"]
        if called in functions:
            raise ConfigError(f"{_PLACE}: two tools are called {short(called)}; rename one")
        functions[called] = function
        schemas.append(schema)
    return Toolbox(functions, tuple(schemas))


async def call_tools(
    policy: Policy,
    prompt: Prompt,
    *,
    tools: Sequence[str],
    tool_timeout: float = 20.0,
    tool_characters: int = 10_000,
) -> None:
    """One rollout: turns with calls, all of a turn at once, until one has none or is cut."""
    toolbox = load_tools(tools)
    messages: list[Mapping[str, Any]] = [*prompt.messages] or [{"role": "user", "content": prompt.text}]
    while True:
        turn = await policy.generate(messages, tools=toolbox.schemas)
        if turn.finish_reason != "stop" or not (turn.tool_calls or turn.unparsed):
            return
        messages.append(turn.message)
        if turn.unparsed:
            messages.append(
                {"role": "tool", "content": f"Error: no call that can be read: {escaped(turn.unparsed)}"}
            )
            continue
        calls = turn.tool_calls[:MOST_CALLS]
        messages += await asyncio.gather(
            *(toolbox.call(call, tool_timeout, tool_characters) for call in calls)
        )
        for call in turn.tool_calls[MOST_CALLS:]:
            name = call["function"]["name"]
            text = f"Error: at most {MOST_CALLS} calls in a turn"
            messages.append({"role": "tool", "name": name, "content": text})
