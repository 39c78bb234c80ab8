"""The gateway with the real clients: what was sampled for what they say is what is trained."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import aiohttp
import anthropic
import httpx2
import openai
import pytest

from mcore_rl.environments.gateway import Endpoint, serve_policy
from mcore_rl.environments.policy import Policy, RolloutLimits
from mcore_rl.rollout.client import RolloutClient
from mcore_rl.rollout.dispatch import Dispatch, Request
from mcore_rl.rollout.reply import Reply
from tests.environments.agents import FUNCTION, PARAMETERS, anthropic_client, openai_client, wander
from tests.environments.support import (
    LIMITS,
    Scripted,
    build_tokenizer,
    chat_prompt,
    check_trained_once,
    policy_of,
)
from tests.rollout.support import VOCAB

TOKENIZER = build_tokenizer()
PROMPT = chat_prompt(TOKENIZER)
ASK = [{"role": "user", "content": "2+2?"}]
CALLS = '<call>add {"a":1,  "b":2}</call><call>add {"a":3,"b":4}</call><e>'
DIALOGUES = int(os.environ.get("GATEWAY_DIALOGUES", "24"))
"""1000 once per release: GATEWAY_DIALOGUES=1000 pytest tests/environments/test_gateway.py"""


def served(server: Scripted, agent: Callable[[Endpoint], Awaitable[Any]]) -> Policy:
    """An agent's run with a policy whose replies are known; its policy, every token checked."""
    policy = policy_of(TOKENIZER, PROMPT, server)

    async def whole() -> None:
        async with serve_policy(policy) as endpoint:
            await agent(endpoint)

    asyncio.run(asyncio.wait_for(whole(), 60))
    (segment,) = policy.recorder.segments(PROMPT)
    trained = [] if segment.trained is None else segment.trained.tolist()
    assert sum(trained) == sum(map(len, server.sampled))
    assert policy.dialogue.rewritten == 0
    return policy


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_of_the_openai_package_is_an_environment(stream: bool) -> None:
    """Parallel calls, whose arguments come back as text, are continued in the ids that were sampled."""

    async def ask(client: openai.AsyncOpenAI, messages: list) -> Any:
        tools: Any = [{"type": "function", "function": FUNCTION}]
        if not stream:
            found = await client.chat.completions.create(model="m", messages=messages, tools=tools)
            assert found.usage is not None
            assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
            return found.choices[0]
        async with client.chat.completions.stream(model="m", messages=messages, tools=tools) as events:
            async for _ in events:
                pass
            return (await events.get_final_completion()).choices[0]

    async def agent(endpoint: Endpoint) -> None:
        async with openai_client(endpoint) as client:
            messages: list = [*ASK]
            choice = await ask(client, messages)
            assert choice.finish_reason == "tool_calls"
            messages.append(choice.message.model_dump(exclude_none=True))
            for call in choice.message.tool_calls:
                its = json.loads(call.function.arguments)
                answer = {"role": "tool", "tool_call_id": call.id, "content": str(its["a"] + its["b"])}
                messages.append(answer)
            assert [one["content"] for one in messages[-2:]] == ["3", "7"]
            choice = await ask(client, messages)
            assert (choice.finish_reason, choice.message.content) == ("stop", "10")

    policy = served(Scripted(TOKENIZER, CALLS, "10<e>"), agent)
    (segment,) = policy.recorder.segments(PROMPT)
    text = TOKENIZER.decode(segment.token_ids)
    assert text == CALLS + "\n<s>tool:3<e>\n<s>tool:7<e>\n<s>assistant:10<e>"


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_of_the_anthropic_package_is_an_environment(stream: bool) -> None:
    async def ask(client: anthropic.AsyncAnthropic, messages: list) -> Any:
        tools: Any = [{"name": "add", "description": "Add.", "input_schema": PARAMETERS}]
        common: Any = {"model": "m", "max_tokens": 64, "messages": messages, "tools": tools}
        if not stream:
            return await client.messages.create(**common)
        async with client.messages.stream(**common) as events:
            return await events.get_final_message()

    async def agent(endpoint: Endpoint) -> None:
        async with anthropic_client(endpoint) as client:
            messages: list = [*ASK]
            said = await ask(client, messages)
            assert said.stop_reason == "tool_use"
            uses = [block for block in said.content if block.type == "tool_use"]
            messages.append({"role": "assistant", "content": said.content})
            answers = [
                {
                    "type": "tool_result",
                    "tool_use_id": use.id,
                    "content": str(use.input["a"] + use.input["b"]),
                }
                for use in uses
            ]
            messages.append({"role": "user", "content": answers})
            said = await ask(client, messages)
            assert (said.stop_reason, said.content[0].text) == ("end_turn", "10")

    policy = served(Scripted(TOKENIZER, CALLS, "10<e>"), agent)
    (segment,) = policy.recorder.segments(PROMPT)
    text = TOKENIZER.decode(segment.token_ids)
    assert text == CALLS + "\n<s>tool:3<e>\n<s>tool:7<e>\n<s>assistant:10<e>"


def test_completions_log_probs_and_models() -> None:
    server = Scripted(TOKENIZER, "1<e>", "2<e>", "3<e>")
    policy = policy_of(TOKENIZER, PROMPT, server)

    async def agent() -> None:
        async with serve_policy(policy, model="tiny") as endpoint, openai_client(endpoint) as client:
            said = await client.completions.create(model="m", prompt="abc", logprobs=1)
            assert (said.choices[0].text, said.model) == ("1", "tiny")
            assert said.choices[0].logprobs is not None
            assert said.choices[0].logprobs.token_logprobs == list(map(float, [-1.001, -1.002]))
            ids: Any = [*PROMPT.token_ids]
            chunks = await client.completions.create(model="m", prompt=ids, stream=True)
            assert [chunk.choices[0].text async for chunk in chunks] == ["2"]
            one: Any = await client.chat.completions.create(model="m", messages=ASK, logprobs=True)  # type: ignore[arg-type]
            assert [entry.token for entry in one.choices[0].logprobs.content] == ["3", "<e>"]
            assert [found.id async for found in client.models.list()] == ["tiny"]

    asyncio.run(asyncio.wait_for(agent(), 60))
    assert TOKENIZER.decode(server.asked[0].prompts[0]) == "abc"


TOOLS_OF_NONE: list[Any] = [
    *({}, {"type": "custom", "custom": {"name": "f"}}, {"type": "function", "function": "f"}),
    *(
        {"type": "function", "function": its}
        for its in ({}, {"name": 1}, {"name": "f", "parameters": []}, {"name": "f", "description": {}})
    ),
]
"""that a server's parser refuses, which would end the run"""


def test_what_is_wrong_is_an_error_in_the_form_of_the_api_and_samples_nothing() -> None:
    server = Scripted(TOKENIZER)
    policy, other = policy_of(TOKENIZER, PROMPT, server), policy_of(TOKENIZER, PROMPT, server)

    async def agent() -> None:
        async with (
            serve_policy(policy) as endpoint,
            serve_policy(other) as theirs,
            aiohttp.ClientSession() as http,
        ):
            crossed = Endpoint(endpoint.url, theirs.key)
            for wrong in (crossed, Endpoint(endpoint.url, ""), Endpoint(endpoint.url + "x", endpoint.key)):
                for path in ("/v1/chat/completions", "/v1/messages", "/v1/completions", "/v1/models"):
                    ask = http.get if path.endswith("models") else http.post
                    headers = {"Authorization": f"Bearer {wrong.key}"}
                    async with ask(wrong.url + path, headers=headers, data="{}") as reply:
                        assert (reply.status, "error" in await reply.json()) == (401, True)
            async with openai_client(endpoint) as client, openai_client(crossed) as stranger:
                with pytest.raises(openai.AuthenticationError):
                    await stranger.chat.completions.create(model="m", messages=ASK)  # type: ignore[arg-type]
                for wrong in (
                    {"messages": []},
                    {"messages": ASK, "max_tokens": 0},
                    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]},
                    *({"messages": ASK, "tools": [tool]} for tool in TOOLS_OF_NONE),
                ):
                    with pytest.raises(openai.BadRequestError):
                        await client.chat.completions.create(model="m", **wrong)  # type: ignore[call-overload]
                none: Any = ([1 << 31], [10**30], [-1], [])
                for ids in none:
                    with pytest.raises(openai.BadRequestError):
                        await client.completions.create(model="m", prompt=ids)
            async with anthropic_client(endpoint) as claude:
                with pytest.raises(anthropic.BadRequestError, match="expected at least one"):
                    await claude.messages.create(model="m", max_tokens=5, messages=[])
            headers = {"x-api-key": endpoint.key}
            lone = json.dumps({"max_tokens": 5, "messages": [{"role": "user", "content": "\ud800"}]})
            strange = (("{", 400), ("[]", 400), ("[" * 100_000, 400), ("x" * (9 << 20), 413), (lone, 400))
            for data, status in strange:
                async with http.post(
                    f"{endpoint.url}/v1/messages", headers=headers, data=io.BytesIO(data.encode())
                ) as reply:
                    assert reply.status == status
                    assert (await reply.json())["type"] == "error"
            bomb = gzip.compress(b" " * (20 << 20))
            for data, status in ((b"no gzip", 400), (gzip.compress(b"{}")[:-9], 400), (bomb, 413)):
                its = {**headers, "Content-Encoding": "gzip"}
                async with http.post(f"{endpoint.url}/v1/messages", headers=its, data=data) as reply:
                    assert (reply.status, (await reply.json())["type"]) == (status, "error")
            for path in ("/v1/embeddings", "/../v1/messages", "/v1/messages/%2e%2e", ""):
                async with http.post(endpoint.url + path, headers=headers, data="{}") as reply:
                    assert reply.status in (401, 404)
        with pytest.raises(aiohttp.ClientConnectorError):
            async with aiohttp.ClientSession() as http, http.get(endpoint.url):
                pass

    asyncio.run(asyncio.wait_for(agent(), 60))
    assert server.asked == []


ACTING = {
    "chat": [
        *({"temperature": 0.7}, {"temperature": True}, {"top_p": 0.9}, {"n": 2}, {"stop": ["x"]}),
        *({"stop": "x"}, {"frequency_penalty": 0.1}, {"presence_penalty": -1}, {"logit_bias": {"3": 5}}),
        *({"tool_choice": "required"}, {"top_logprobs": 3}, {"response_format": {"type": "json_object"}}),
        *({"parallel_tool_calls": False}, {"reasoning_effort": "low"}, {"extra_body": {"top_k": 5}}),
        *({"extra_body": {"repetition_penalty": 1.1}}, {"extra_body": {"chat_template_kwargs": {"a": 1}}}),
        {"extra_body": {"logprobs": "yes"}},
    ],
    "completions": [{"best_of": 2}, {"echo": True}, {"suffix": "x"}, {"stop": "x"}, {"temperature": 0}],
    "responses": [
        *(
            {"temperature": 0.7},
            {"reasoning": {"effort": "low"}},
            {"truncation": "auto"},
            {"background": True},
        ),
        *({"text": {"format": {"type": "json_object"}}}, {"previous_response_id": "resp_x"}),
        *({"include": ["message.output_text.logprobs"]}, {"tools": [{"type": "web_search"}]}),
    ],
    "messages": [
        *({"extra_body": {"temperature": 0.7}}, {"extra_body": {"top_k": 5}}, {"stop_sequences": ["x"]}),
        *({"tool_choice": {"type": "any"}}, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
        {"extra_body": {"top_p": 0.5}},
    ],
}
HARMLESS = {
    "chat": [
        {"temperature": 0.5},
        {"seed": 3, "user": "x", "n": 1, "stop": None, "logit_bias": {}, "extra_body": {"stream": None}},
    ],
    "completions": [{"temperature": 0.5, "top_p": 1}],
    "responses": [{"temperature": 0.5, "store": False, "include": ["reasoning.encrypted_content"]}],
    "messages": [
        {
            "extra_body": {"temperature": 0.5, "metadata": {}},
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
        }
    ],
}


def test_a_parameter_that_would_act_is_refused_by_name_and_what_changes_nothing_is_taken() -> None:
    """The run samples at temperature 0.5: an agent may say the same, and nothing else."""
    server = Scripted(TOKENIZER, *["1<e>"] * 7)
    policy = policy_of(TOKENIZER, PROMPT, server, sampling={"temperature": 0.5})

    async def agent() -> None:
        async with (
            serve_policy(policy) as endpoint,
            openai_client(endpoint) as chat,
            anthropic_client(endpoint) as claude,
        ):
            asks: dict[str, Callable[..., Awaitable[Any]]] = {
                "chat": partial(chat.chat.completions.create, model="m", messages=ASK),  # type: ignore[arg-type]
                "completions": partial(chat.completions.create, model="m", prompt="2+2?"),
                "responses": partial(chat.responses.create, model="m", input="2+2?"),
                "messages": partial(claude.messages.create, model="m", max_tokens=9, messages=ASK),  # type: ignore[arg-type]
            }
            for api, ask in asks.items():
                for wrong in ACTING[api]:
                    name = next(iter(wrong.get("extra_body") or wrong))
                    with pytest.raises((openai.BadRequestError, anthropic.BadRequestError), match=name):
                        await ask(**wrong)
            assert server.asked == []
            for api, ask in asks.items():
                for one in HARMLESS[api]:
                    await ask(**one)
        async with serve_policy(policy, ignored=["temperature"]) as endpoint, openai_client(endpoint) as chat:
            await chat.chat.completions.create(model="m", messages=ASK, temperature=0)  # type: ignore[arg-type]
            with pytest.raises(openai.BadRequestError, match="top_p"):
                await chat.chat.completions.create(model="m", messages=ASK, temperature=0, top_p=0.5)  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(agent(), 60))
    assert len(server.asked) == 6
    assert {request.sampling_params[0]["temperature"] for request in server.asked} == {0.5}


def test_a_rollout_without_turns_left_is_a_bad_request_that_is_not_tried_again() -> None:
    server = Scripted(TOKENIZER, *["1<e>"] * LIMITS.turns)

    async def agent(endpoint: Endpoint) -> None:
        async with openai.AsyncOpenAI(base_url=endpoint.openai_url, api_key=endpoint.key) as client:
            for _ in range(LIMITS.turns):
                await client.chat.completions.create(model="m", messages=ASK)  # type: ignore[arg-type]
            with pytest.raises(openai.BadRequestError, match="all its turns"):
                await client.chat.completions.create(model="m", messages=ASK)  # type: ignore[arg-type]

    policy = policy_of(TOKENIZER, PROMPT, server)

    async def whole() -> None:
        async with serve_policy(policy) as endpoint:
            await agent(endpoint)

    asyncio.run(asyncio.wait_for(whole(), 60))
    assert len(server.asked) == LIMITS.turns


def test_a_client_that_leaves_and_a_rollout_that_ends_end_the_generation_and_train_nothing() -> None:
    ended = 0

    async def slow(request: Request) -> list[Reply]:
        nonlocal ended
        try:
            await asyncio.sleep(30)
        finally:
            ended += 1
        return []

    policy = policy_of(TOKENIZER, PROMPT, slow)

    async def ends(times: int) -> None:
        for _ in range(100):
            await asyncio.sleep(0.02)
            if ended == times:
                break

    async def whole() -> None:
        async with serve_policy(policy) as endpoint, openai_client(endpoint) as client:
            with pytest.raises(openai.APITimeoutError):
                await client.chat.completions.create(model="m", messages=ASK, timeout=0.2)  # type: ignore[arg-type]
            await ends(1)
        async with serve_policy(policy) as endpoint:
            client = openai_client(endpoint)
            left = asyncio.create_task(client.chat.completions.create(model="m", messages=ASK))  # type: ignore[arg-type]
            await asyncio.sleep(0.2)
        await ends(2)
        with pytest.raises(openai.APIConnectionError):
            await left
        await client.close()

    asyncio.run(asyncio.wait_for(whole(), 60))
    assert (ended, policy.progress.generating) == (2, 0)
    assert policy.recorder.segments(PROMPT) == ()


@pytest.mark.xdist_group("rollout")  # whose server it is, of a model with more tokens than the tokenizer
@pytest.mark.slow
def test_what_servers_sampled_for_random_dialogues_is_what_is_trained(url: str) -> None:
    """Text in between is no record: most tokens of this server have none at all."""

    async def dialogue(seed: int, ask: Callable, clients: tuple[Any, Any]) -> int:
        log: list[tuple[list[int], Reply]] = []

        async def logged(request: Request) -> list[Reply]:
            (reply,) = await ask(request)
            log.append(([*request.prompts[0]], reply))
            return [reply]

        policy = policy_of(TOKENIZER, PROMPT, logged, limits=RolloutLimits(99, 500, 600.0, 600.0))
        async with serve_policy(policy) as endpoint:
            await wander(endpoint, random.Random(seed), clients)
        segments = policy.recorder.segments(PROMPT)
        check_trained_once(segments, log)
        assert policy.dialogue.rewritten == 0
        return len(segments)

    async def whole() -> list[int]:

        client = RolloutClient(url, timeout=60.0, vocabulary=VOCAB)
        version = "default"
        async with (
            Dispatch([client], version=version, health_timeout=60.0) as dispatch,
            httpx2.AsyncClient(timeout=60) as one,
            httpx2.AsyncClient(timeout=60) as two,
        ):
            found: list[int] = []
            for start in range(0, DIALOGUES, 8):
                part = range(start, min(start + 8, DIALOGUES))
                found += await asyncio.gather(*(dialogue(k, dispatch.ask, (one, two)) for k in part))
            return found

    counts = asyncio.run(asyncio.wait_for(whole(), 900))
    forked = sum(count > 1 for count in counts)
    assert len(counts) == DIALOGUES
    assert forked > DIALOGUES // 3, "the control: dialogues are rewritten"
