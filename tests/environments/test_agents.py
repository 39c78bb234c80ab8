"""Unmodified agents of the `openai` and `anthropic` packages against the embedded server, by the gateway."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from mcore_rl.environments.parsers import ServerParsers
from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.server.api import Api
from tests.environments.agents import save_chain
from tests.environments.dialogues import run_agents
from tests.environments.served import embedded

DIALOGUES = int(os.environ.get("GATEWAY_DIALOGUES", "16"))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Api]]:
    with embedded(save_chain(tmp_path_factory.mktemp("chain"))) as served:
        yield served


@pytest.mark.slow
def test_what_the_server_sampled_for_agents_with_tools_and_streams_is_what_is_trained(
    chain: tuple[str, Api],
) -> None:
    url, api = chain
    client = run_agents(url, DIALOGUES)
    assert client.cached > client.prompted // 2, "turns go on from what their session has computed"
    assert api.worker.engine.prefixes.used <= api.worker.engine.prefixes.capacity


def test_a_parser_that_the_servers_have_not_ends_the_run_by_name(chain: tuple[str, Api]) -> None:
    async def ask() -> None:
        async with RolloutClient(chain[0], timeout=30.0) as client:
            await ServerParsers("qwen25").read("x", [{}], client.parse)

    with pytest.raises(RejectedError, match=r"404.*'qwen25': check environment.tool_call_parser"):
        asyncio.run(ask())
