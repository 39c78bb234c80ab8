"""Unmodified agents of the `openai` and `anthropic` packages against a real SGLang server, by the gateway."""

from __future__ import annotations

import os

import pytest

from tests.environments.agents import save_chain
from tests.environments.dialogues import run_agents
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
