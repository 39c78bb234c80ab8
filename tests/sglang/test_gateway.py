"""Unmodified agents of the `openai` and `anthropic` packages against a real SGLang server, by the gateway."""

from __future__ import annotations

import asyncio
import os

import pytest

from mcore_rl.environments.parsers import ServerParsers
from mcore_rl.errors import RolloutError
from mcore_rl.rollout.client import RolloutClient
from tests.environments.agents import ASK, FUNCTION, chain_tokenizer, save_chain
from tests.environments.dialogues import run_agents
from tests.environments.hang_up import run_hang_up
from tests.environments.support import Scripted, chat_prompt, policy_of
from tests.sglang.conftest import sglang_server

DIALOGUES = int(os.environ.get("GATEWAY_DIALOGUES", "24"))


@pytest.fixture(scope="module")
def chain_url(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("chain")
    options = ("--max-total-tokens", "65536")  # what every conversation holds at its end, side by side
    with sglang_server(save_chain(root / "model"), root / "log", *options) as server:
        yield server.url
        server.check()


def test_what_sglang_sampled_for_agents_with_tools_and_streams_is_what_is_trained(chain_url: str) -> None:
    client = run_agents(chain_url, DIALOGUES)
    assert client.cached > 0, "a session goes on where its prefix is"


def test_a_client_that_hangs_up_ends_the_request_at_sglang(chain_url: str) -> None:
    run_hang_up(chain_url)


THOUGHT = 'I add.</think>So:\n<tool_call>\n{"name":"add",  "arguments":{"a":1,"b":2}}\n</tool_call><e>'


def test_a_servers_own_parsers_read_an_answer_by_their_names(chain_url: str) -> None:
    tokenizer, names = chain_tokenizer(), ServerParsers("qwen25", "deepseek-r1")
    tools = [{"type": "function", "function": FUNCTION}]

    async def ask() -> None:
        async with RolloutClient(chain_url, timeout=30.0) as client:
            policy = policy_of(
                tokenizer,
                chat_prompt(tokenizer),
                Scripted(tokenizer, THOUGHT, '<tool_call>\n{"name":"add"<e>', "3<e>", "3<e>"),
                response=None,
                parsers=names,
                parse=client.parse,
            )
            turn = await policy.generate([ASK], tools=tools)
            assert turn.message["reasoning_content"] == "I add."
            assert turn.message["content"].strip() == "So:"
            (call,) = turn.tool_calls
            assert call["function"] == {"name": "add", "arguments": {"a": 1, "b": 2}}
            cut = await policy.generate([ASK], tools=tools)
            assert cut.tool_calls == ()
            plain = await policy.generate([ASK], tools=[])
            assert plain.tool_calls == ()
            strange = policy_of(
                tokenizer,
                chat_prompt(tokenizer),
                Scripted(tokenizer, "3<e>"),
                response=None,
                parsers=ServerParsers("nobodys"),
                parse=client.parse,
            )
            with pytest.raises(RolloutError, match=r"tool_call_parser"):
                await strange.generate([ASK], tools=tools)
            assert isinstance(strange.progress.broken, RolloutError)

    asyncio.run(asyncio.wait_for(ask(), 120))
