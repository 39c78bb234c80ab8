"""What dies in mid-dialogue, and clients that mean harm: counted, refused or continued; nothing hangs."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from typing import Any

import aiohttp
import httpx2
import psutil
import pytest

from mcore_rl.environments.dialogue import ChatTemplate
from mcore_rl.environments.gateway import serve_policy, server
from mcore_rl.environments.run import Environment, Environments
from mcore_rl.environments.sessions import SessionKeeper
from mcore_rl.rollout.client import RejectedError
from mcore_rl.rollout.dispatch import Dispatch, Request
from mcore_rl.rollout.processes import Embedded, LocalServer
from mcore_rl.rollout.reply import Reply
from mcore_rl.types import Sample, VersionSpan
from tests.environments.agents import CHAIN_VOCAB, RawClient, agents, chain_tokenizer, save_chain
from tests.environments.dialogues import LIMITS as LONG
from tests.environments.served import embedded
from tests.environments.support import (
    LIMITS,
    RESPONSE,
    Scripted,
    build_tokenizer,
    chat_prompt,
    check_trained_once,
    policy_of,
)

TOKENIZER = build_tokenizer()
PROMPT = chat_prompt(TOKENIZER)
BODY = '{"model": "m", "messages": [{"role": "user", "content": "2+2?"}]}'
AGENT = """
import json, sys, urllib.request
url, key = sys.argv[1:]
messages = [{"role": "user", "content": "2+2?"}]
while True:
    body = json.dumps({"model": "m", "messages": messages}).encode()
    asked = urllib.request.Request(url + "/chat/completions", body, {"Authorization": "Bearer " + key})
    said = json.load(urllib.request.urlopen(asked))["choices"][0]["message"]
    messages += [said, {"role": "user", "content": "go on"}]
"""
"""asks for ever; without a package, so that it starts at once"""


async def runs_a_process(policy, prompt):
    """An environment whose agent is a process."""
    async with serve_policy(policy) as endpoint:
        command = [sys.executable, "-S", "-c", AGENT, endpoint.openai_url, endpoint.key]
        agent = await asyncio.create_subprocess_exec(*command)
        try:
            code = await agent.wait()
        finally:
            if agent.returncode is None:
                agent.kill()
                await agent.wait()
        if code:
            raise RuntimeError(f"the agent ended with {code}")
    return 1.0


def my_agents() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if AGENT in one.cmdline()]


def play_until(act, *, timeout: float = 60.0) -> tuple[Sample, int]:
    """A rollout of which `act` is told while its second turn is being sampled; how many requests ended so."""
    asked = ended = 0

    async def slow_second(request: Request) -> list[Reply]:
        nonlocal asked, ended
        asked += 1
        if asked == 1:
            return await Scripted(TOKENIZER, "4<e>")(request)
        act()
        try:
            await asyncio.sleep(60)
        finally:
            ended += 1
        return []

    async def whole() -> list[Sample]:
        template = ChatTemplate(TOKENIZER, response=RESPONSE)
        limits = LIMITS.__class__(8, 400, timeout, 60.0)
        environments = Environments(Environment("m:f", runs_a_process, template, limits, {}))
        params = [{"max_new_tokens": 8, "sampling_seed": 0}]
        try:
            request = Request([PROMPT.token_ids], params, ["p@1/0"], None, PROMPT)
            return await environments.play(request, slow_second)
        finally:
            await asyncio.to_thread(environments.close)

    (sample,) = asyncio.run(asyncio.wait_for(whole(), 90))
    return sample, ended


def test_an_agent_that_is_killed_in_mid_dialogue_is_one_void_sample_and_its_generation_ends() -> None:
    sample, ended = play_until(lambda: [agent.send_signal(signal.SIGKILL) for agent in my_agents()])
    assert sample.void
    assert sample.failure is not None
    assert sample.failure[0] == "raised"
    assert "the agent ended with -9" in sample.failure[1]
    assert (ended, my_agents()) == (1, [])


def test_an_agent_whose_rollout_is_too_late_is_ended_with_it() -> None:
    sample, ended = play_until(lambda: None, timeout=3.0)
    assert sample.void
    assert sample.failure is not None
    assert sample.failure[0] == "timeout"
    assert (ended, my_agents()) == (1, [])


def play_for_ever(told: Connection) -> None:
    """What the process of a rank does: a rollout whose second turn never comes."""
    play_until(lambda: told.send([agent.pid for agent in my_agents()]))


def test_an_agent_ends_with_the_process_of_its_gateway() -> None:
    """That is killed in mid-dialogue: its agents, processes of their own, are told by their connection."""
    ours, theirs = Pipe()
    rank = get_context("fork").Process(target=play_for_ever, args=(theirs,), daemon=True)
    rank.start()
    try:
        assert ours.poll(60), "it has asked for the second turn"
        (agent,) = map(psutil.Process, ours.recv())
        assert agent.ppid() == rank.pid
        assert rank.pid is not None
        os.kill(rank.pid, signal.SIGKILL)
        rank.join(10)
        with suppress(psutil.NoSuchProcess):
            agent.wait(20)
    finally:
        rank.kill()
        rank.join(10)
    assert not (agent.is_running() and agent.status() != psutil.STATUS_ZOMBIE)


@pytest.fixture(scope="module")
def two_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, LocalServer]]:
    """One in this process, and one that may be killed."""
    root = tmp_path_factory.mktemp("two")
    model = save_chain(root / "model")
    with embedded(model) as (url, _), LocalServer(model, Embedded(threads=1), log_file=root / "log") as two:
        yield url, two


@pytest.mark.slow
def test_dialogues_go_on_at_another_server_when_theirs_is_killed(
    two_servers: tuple[str, LocalServer],
) -> None:
    """Every reply that was taken is trained once, and none was taken twice."""
    url, own = two_servers
    tokenizer = chain_tokenizer()
    prompt = chat_prompt(tokenizer)
    clients = [RawClient(one, timeout=60.0, retries=0, vocabulary=CHAIN_VOCAB) for one in (url, own.url)]
    killed = False

    async def rollout(k: int, dispatch: Dispatch, https: list[httpx2.AsyncClient]) -> int:
        log: list[tuple[list[int], Reply]] = []

        async def logged(request: Request) -> list[Reply]:
            nonlocal killed
            (reply,) = await dispatch.ask(request)
            log.append(([*request.prompts[0]], reply))
            if not killed and len(clients[1].raw) >= 20:
                killed = True
                own.kill()
            return [reply]

        policy = policy_of(tokenizer, prompt, logged, limits=LONG, rid=f"d{k}")
        async with serve_policy(policy) as endpoint:
            await agents(endpoint, https, random.Random(k))
        check_trained_once(policy.recorder.segments(prompt), log)
        return len(log)

    async def whole() -> tuple[int, dict[str, str]]:
        async with (
            Dispatch(clients, version="default", health_timeout=60.0) as dispatch,
            httpx2.AsyncClient(timeout=120) as one,
            httpx2.AsyncClient(timeout=120) as two,
        ):
            counts = await asyncio.gather(*(rollout(k, dispatch, [one, two]) for k in range(12)))
            return sum(counts), dispatch.lost

    taken, lost = asyncio.run(asyncio.wait_for(whole(), 200))
    assert killed
    assert list(lost) == [own.url]
    assert taken <= len(clients[0].raw) + len(clients[1].raw)
    assert len(clients[1].raw) >= 20


def test_a_client_that_is_slow_large_or_strange_is_refused_and_others_are_answered(monkeypatch) -> None:
    monkeypatch.setattr(server, "_BODY_SECONDS", 0.5)
    said = Scripted(TOKENIZER, "4<e>")
    policy = policy_of(TOKENIZER, PROMPT, said)

    async def statuses() -> dict[str, int]:
        found: dict[str, int] = {}
        async with serve_policy(policy) as endpoint, aiohttp.ClientSession() as http:
            url = f"{endpoint.openai_url}/chat/completions"
            right = {"Authorization": f"Bearer {endpoint.key}"}

            async def trickle():
                for letter in BODY:
                    yield letter.encode()
                    await asyncio.sleep(0.2)

            async def ask(name: str, data: Any, **headers: str) -> None:
                async with http.post(url, data=data, headers=right | headers) as reply:
                    found[name] = reply.status
                    assert "error" in await reply.json() or reply.status == 200

            slow = asyncio.create_task(ask("slow", trickle()))
            await ask("in between", BODY)
            bomb = gzip.compress(bytes(64 << 20))
            assert len(bomb) < 1 << 17
            await ask("bomb", bomb, **{"Content-Encoding": "gzip"})
            await ask("surrogate", BODY.replace("2+2?", "\\ud800"))
            tool = {"type": "function", "function": {"name": "\ud800"}}  # which this template does not write
            await ask("surrogate tool", json.dumps({**json.loads(BODY), "tools": [tool]}))
            await ask("deep", '{"messages": ' + "[" * 50_000)
            await slow
            for name, headers in (
                ("no key", {}),
                ("basic", {"Authorization": f"Basic {endpoint.key}"}),
                ("in the query", {}),
                ("strange key", {"x-api-key": "\u00e9"}),
            ):
                where = f"{url}?key={endpoint.key}" if name == "in the query" else url
                async with http.post(where, data=BODY, headers=headers) as reply:
                    found[name] = reply.status
                    assert endpoint.key not in await reply.text()
        return found

    assert asyncio.run(asyncio.wait_for(statuses(), 60)) == {
        "in between": 200,
        "slow": 408,
        "bomb": 413,
        "surrogate": 400,
        "surrogate tool": 400,
        "deep": 400,
        **dict.fromkeys(("no key", "basic", "in the query", "strange key"), 401),
    }
    assert len(said.asked) == 1


def test_responses_that_are_asked_for_side_by_side_each_go_on_as_themselves() -> None:
    """And what no client may send is refused in the form of the API; a token of no model ends no run."""
    asked: list[Request] = []

    async def ask(request: Request) -> list[Reply]:
        asked.append(request)
        await asyncio.sleep(0.02)
        if max(request.prompts[0]) >= 1 << 20:
            raise RejectedError("HTTP 400", 400)
        ids = tuple(TOKENIZER.encode("4<e>", add_special_tokens=False))
        return [Reply(request.rids[0], ids, (-0.1, -0.1), (), "stop", (VersionSpan("0", 0, 2),))]

    policy = policy_of(TOKENIZER, PROMPT, ask)
    deep = '{"a": ' * 50_000
    call = {"type": "function_call", "name": "f", "arguments": deep}
    spoken = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": deep}}]}

    async def whole() -> None:
        async with serve_policy(policy) as endpoint, aiohttp.ClientSession() as http:
            right = {"Authorization": f"Bearer {endpoint.key}"}

            async def post(api: str, text: str | dict, status: int) -> Any:
                body = text if isinstance(text, str) else json.dumps(text)
                async with http.post(f"{endpoint.openai_url}/{api}", data=body, headers=right) as reply:
                    assert reply.status == status, await reply.text()
                    return await reply.json()

            found = await asyncio.gather(*(post("responses", {"input": word}, 200) for word in ("aa", "bb")))
            for reply, word in zip(found, ("aa", "bb"), strict=True):
                await post("responses", {"input": "on", "previous_response_id": reply["id"]}, 200)
                assert f"user:{word}<e>" in policy.decode(asked[-1].prompts[0])
            nothing_said = {"role": "assistant", "content": None}
            await post("responses", {"input": [{"role": "user", "content": "cc"}, nothing_said]}, 200)
            assert "user:cc<e>" in policy.decode(asked[-1].prompts[0])
            count = len(asked)
            for api, wrong in (
                ("responses", {"input": [call]}),
                ("chat/completions", {"messages": [spoken]}),
                ("responses", {"input": "x", "previous_response_id": []}),
                ("responses", {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}),
                ("responses", {"input": [{"role": "user", "content": None}]}),
                ("responses", {"input": [{"type": "function_call_output", "output": None}]}),
                ("responses", '{"input": "x", "metadata": {"a": NaN}}'),
                ("responses", '{"input": "x", "metadata": {"a": 1e999}}'),
            ):
                said = (await post(api, wrong, 400))["error"]["message"]
                assert "Error" not in said, said
            assert len(asked) == count
            said = (await post("completions", {"prompt": [1 << 20]}, 400))["error"]["message"]
            assert "refuses the ids" in said
            assert policy.progress.broken is None

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_the_gateway_listens_on_this_machine_alone() -> None:
    policy = policy_of(TOKENIZER, PROMPT, Scripted(TOKENIZER))

    async def whole() -> list[str]:
        async with serve_policy(policy) as endpoint:
            port = int(endpoint.url.split(":")[2].split("/")[0])
            found = psutil.Process(os.getpid()).net_connections("tcp")
            return [one.laddr.ip for one in found if one.laddr.port == port and one.status == "LISTEN"]

    assert asyncio.run(whole()) == ["127.0.0.1"]


def test_a_state_that_raises_is_the_rollouts_error_and_not_the_clients() -> None:
    policy = policy_of(TOKENIZER, PROMPT, Scripted(TOKENIZER))

    def state() -> None:
        raise TypeError("of the environment")

    policy.keeper = SessionKeeper(state, [])

    async def whole() -> None:
        async with serve_policy(policy) as endpoint, aiohttp.ClientSession() as http:
            for stream in (False, True):
                headers = {"Authorization": f"Bearer {endpoint.key}"}
                body = json.loads(BODY) | {"stream": stream}
                url = f"{endpoint.openai_url}/chat/completions"
                async with http.post(url, headers=headers, json=body) as reply:
                    assert reply.status == 500
                    assert "of the environment" in (await reply.json())["error"]["message"]

    asyncio.run(asyncio.wait_for(whole(), 60))
    assert "of the environment" in policy.progress.stateless
