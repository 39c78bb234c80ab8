"""Tools: calls of one turn run side by side, and whatever goes wrong is text that the model reads."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.calculator import build_tokenizer as build_calculator
from examples.calculator import calculate, demonstration
from mcore_rl.config import Config
from mcore_rl.environments.load import load_environment, load_response
from mcore_rl.environments.policy import LimitReached
from mcore_rl.environments.tools import MOST_CALLS, call_tools, load_tools
from mcore_rl.errors import ConfigError
from mcore_rl.types import Prompt
from tests.environments.support import LIMITS, Scripted, build_tokenizer, chat_prompt, policy_of

HERE = "tests.environments.test_tools"
_both = threading.Barrier(2, timeout=10)


def add(a: int, b: int = 0) -> int:
    """Add.

    Args:
        a: a number.
        b: another.
    """
    return a + b


async def wait(seconds: float) -> dict[str, float]:
    """Wait.

    Args:
        seconds: how long.
    """
    await asyncio.sleep(seconds)
    return {"waited": seconds}


def meet(a: int) -> str:
    """Return once two calls are here.

    Args:
        a: who.
    """
    _both.wait()
    return "x" * 130 if a else "met"


def leave(code: int) -> str:
    """Leave.

    Args:
        code: status.
    """
    raise SystemExit(code)


def undocumented(a, b):
    return a + b


TOOLS = [f"{HERE}:{name}" for name in ("add", "wait", "meet", "leave")]


def observed(*said: str, tools: list[str] = TOOLS) -> list[str]:
    """What the tools answered to the first turn of a rollout that says these."""
    tokenizer = build_tokenizer()
    prompt = chat_prompt(tokenizer)
    server = Scripted(tokenizer, *said)
    policy = policy_of(tokenizer, prompt, server, limits=replace(LIMITS, tokens=4000))
    work = call_tools(policy, prompt, tools=tools, tool_timeout=0.2, tool_characters=100)
    assert asyncio.run(asyncio.wait_for(work, 20)) is None
    assert policy.progress.text == said[-1].removesuffix("<e>")
    assert policy.dialogue.rewritten == 0
    (segment,) = policy.recorder.segments(prompt)
    assert len(segment.log_probs) == sum(map(len, server.sampled))
    text = tokenizer.decode(server.asked[-1].prompts[0])
    return [part.partition("<e>")[0] for part in text.split("<s>tool:")[1:]]


@pytest.mark.parametrize(
    ("call", "answers"),
    [
        ('<call>add {"a": 1,"b":2}</call>', ["3"]),
        ('<call>add {"a":1}</call><call>wait {"seconds":0}</call>', ["1", '{"waited": 0}']),
        (
            '<call>meet {"a":0}</call><call>meet {"a":1}</call>',
            ["met", "x" * 100 + "... (30 characters more)"],
        ),
        (
            '<call>gone {"a":1}</call>',
            ["Error: there is no tool gone; the tools are: add, wait, meet, leave"],
        ),
        ('<call>add {"c":1}</call>', ["Error: missing a required argument: 'a'"]),
        (
            '<call>add {"a":"x","b":1}</call>',
            ['Error: TypeError: can only concatenate str (not "int") to str'],
        ),
        ('<call>leave {"code":1}</call>', ["Error: SystemExit: 1"]),
        ('<call>wait {"seconds":9}</call>', ["Error: no answer within 0.2 s"]),
    ],
)
def test_calls_are_answered_in_their_order_and_errors_are_text(call: str, answers: list[str]) -> None:
    assert observed(call + "<e>", "so<e>") == answers


def test_more_calls_than_a_turn_may_have_and_calls_that_cannot_be_read_are_errors() -> None:
    many = '<call>add {"a":1}</call>' * (MOST_CALLS + 1)
    found = observed(many + "<e>", "so<e>")
    assert found[:-1] == ["1"] * MOST_CALLS
    assert "at most 32 calls" in found[-1]
    (error,) = observed("<call>add {1</call><e>", "so<e>")
    assert "no call that can be read" in error
    assert observed("so<e>", tools=[]) == [], "and one without a call ends the rollout"


def test_a_model_that_calls_for_ever_meets_its_limit() -> None:
    with pytest.raises(LimitReached, match="turns"):
        observed(*['<call>add {"a":1}</call><e>'] * 9)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ([f"{HERE}:undocumented"], "has no schema"),
        ([f"{HERE}:add", f"{HERE}:add"], "two tools are called add"),
        ([f"{HERE}:gone"], "has no gone"),
        (["add"], "not of the form"),
        (f"{HERE}:add", "is no list; write"),
        ([3], "is no list; write"),
        (3, "is no list; write"),
    ],
)
def test_a_tool_that_cannot_be_one_is_named(names: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_tools(names)


def test_an_environment_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    name = "mcore_rl.environments.tools:call_tools"
    assert load_environment(name, {"tools": []})
    for wrong, arguments, what in (
        (f"{HERE}:add", {}, "is no async function"),
        (name, {}, "missing a required argument: 'tools'"),
        (name, {"tools": [], "toolz": 1}, "toolz"),
        (f"{HERE}:gone", {}, "has no gone"),
    ):
        with pytest.raises(ConfigError, match=what):
            load_environment(wrong, arguments)
    file = tmp_path / "response.json"
    with pytest.raises(ConfigError, match="No such file"):
        load_response(file, None)
    for text in ("{", "[]", "{}", '{"fields": {"a": {}}}'):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"response\.json"):
            load_response(file, None)
    file.write_text(json.dumps(build_calculator().response_template))
    assert load_response(file, None) == build_calculator().response_template


def test_the_calculators_conversations_are_continued_token_by_token() -> None:
    tokenizer = build_calculator()
    shown = demonstration((417, 86), calls=True)
    user, call, _, answer = shown["prompt"]
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    text = tokenizer.decode(ids)
    prompt = Prompt("417*86", text, tuple(ids), calculate("417*86"), {}, [user])
    said = '<call>{"name": "calculate", "arguments": {"expression": "417*86"}}</call><eos>'
    server = Scripted(tokenizer, said, "35862<eos>", end="<eos>")
    policy = policy_of(tokenizer, prompt, server, response=tokenizer.response_template)
    work = call_tools(policy, prompt, tools=["examples.calculator:calculate"])
    assert asyncio.run(asyncio.wait_for(work, 20)) is None
    (segment,) = policy.recorder.segments(prompt)
    whole = tokenizer.apply_chat_template(shown["prompt"], return_dict=False)
    assert [*segment.context, *segment.token_ids] == whole
    assert (policy.progress.text, answer["content"]) == (prompt.label, prompt.label)
    assert call["tool_calls"][0]["function"]["arguments"] == {"expression": "417*86"}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"environment": {"max_turns": 3}}, "environment.max_turns: has no effect"),
        ({"environment": {"function": "no"}}, "must be `module:function`"),
        ({"environment": {"function": "m:f", "max_tokens": 1000}}, "leave no room behind a prompt"),
        ({"environment": {"function": "m:f", "timeout": 540.0}}, "a step waits 540 s"),
        ({"environment": {"function": "m:f", "max_tokens": 20000}}, "environment.max_tokens, padded"),
        (
            {"environment": {"function": "m:f"}, "rollout": {"routing_replay": True}},
            "rollout.routing_replay: experts of several turns",
        ),
        (
            {"environment": {"function": "m:f"}, "reward": {"model": Path("rm")}},
            "reward.model: scores a response",
        ),
    ],
)
def test_what_an_environment_cannot_go_together_with_is_refused(changes: dict, what: str) -> None:
    some = Path("some")
    base = {"run": {"dir": some}, "model": {"path": some}, "data": {"train": (some,)}, "train": {"steps": 1}}
    with pytest.raises(ValueError, match=re.escape(what)):
        Config.model_validate(base | changes)
