"""Answers that are streamed while they are sampled: what a client sees, and what is recorded of them."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from mcore_rl.environments.dialogue import AskedTurn, ChatTemplate
from mcore_rl.environments.gateway import Endpoint, serve_policy
from mcore_rl.environments.live import LiveTurn
from mcore_rl.environments.policy import Policy, parse
from mcore_rl.rollout.dispatch import Request
from mcore_rl.rollout.reply import Asked, MalformedReplyError, Reply, parse_reply
from mcore_rl.rollout.streaming import StreamedReply, TokenStream
from mcore_rl.server.api import Api
from mcore_rl.types import VersionSpan
from tests.environments.agents import (
    ASK,
    anthropic_client,
    chain_tokenizer,
    openai_client,
    save_chain,
)
from tests.environments.hang_up import run_hang_up
from tests.environments.served import embedded
from tests.environments.support import LIMITS, RESPONSE, build_tokenizer, chat_prompt, policy_of

TOKENIZER = build_tokenizer()
PROMPT = chat_prompt(TOKENIZER)


class Steps:
    """A server that tells one token, and the others when it is let."""

    def __init__(self, said: str, *, cut: bool = False) -> None:
        self.ids = tuple(TOKENIZER.encode(said, add_special_tokens=False))
        self.go, self.ended = asyncio.Event(), False
        self._cut = cut

    async def __call__(self, request: Request) -> list[Reply]:
        stream = request.stream
        assert stream is not None
        stream.tell(self.ids[:1])
        told = len(self.ids)
        if self._cut:  # until the listener has had enough
            await stream.wait_stopped()
            told = 2
        else:
            await self.go.wait()
            for k in range(2, len(self.ids) + 1):
                stream.tell(self.ids[:k])
        self.ended = True
        ids, reason = self.ids[:told], "abort" if self._cut else "stop"
        return [Reply(request.rids[0], ids, (-0.5,) * told, (), reason, (VersionSpan("0", 0, told),))]


def gateway(ask: Any, agent: Callable[[Endpoint], Any]) -> Policy:
    policy = policy_of(TOKENIZER, PROMPT, ask)

    async def whole() -> None:
        async with serve_policy(policy) as endpoint:
            await agent(endpoint)

    asyncio.run(asyncio.wait_for(whole(), 60))
    return policy


async def chat_texts(client: Any) -> AsyncIterator[str]:
    chunks = await client.chat.completions.create(model="m", messages=[ASK], stream=True)
    async for chunk in chunks:
        yield chunk.choices[0].delta.content or ""


async def completion_texts(client: Any) -> AsyncIterator[str]:
    chunks = await client.completions.create(model="m", prompt="2+2?", stream=True)
    async for chunk in chunks:
        yield chunk.choices[0].text


async def response_texts(client: Any) -> AsyncIterator[str]:
    async with client.responses.stream(model="m", input=[ASK]) as events:
        async for event in events:
            if event.type == "error":  # which the package hands on
                raise RuntimeError(event.message)
            if event.type == "response.output_text.delta":
                yield event.delta


async def message_texts(client: Any) -> AsyncIterator[str]:
    async with client.messages.stream(model="m", max_tokens=64, messages=[ASK]) as stream:
        async for text in stream.text_stream:
            yield text


TEXTS = {
    "chat": chat_texts,
    "completions": completion_texts,
    "responses": response_texts,
    "messages": message_texts,
}


async def texts(endpoint: Endpoint, api: str) -> AsyncIterator[str]:
    """The pieces of text that a client of the real packages is given."""
    make = anthropic_client if api == "messages" else openai_client
    async with make(endpoint) as client:
        async for text in TEXTS[api](client):
            if text:
                yield text


@pytest.mark.parametrize("api", TEXTS)
def test_the_first_token_is_with_the_client_before_the_last_is_sampled(api: str) -> None:
    server = Steps("xyzzy<e>")

    async def agent(endpoint: Endpoint) -> None:
        found = []
        async for text in texts(endpoint, api):
            if not found:
                assert not server.ended
                server.go.set()
            found.append(text)
        assert "".join(found) == "xyzzy"
        assert len(found) > 1

    policy = gateway(server, agent)
    (segment,) = policy.recorder.segments(PROMPT)
    assert tuple(segment.token_ids.tolist())[-6:] == server.ids


@pytest.mark.parametrize("api", TEXTS)
def test_a_client_that_hangs_up_ends_the_response_and_what_was_sampled_is_recorded_once(api: str) -> None:
    server = Steps("xyzzy<e>", cut=True)

    async def agent(endpoint: Endpoint) -> None:
        async for text in texts(endpoint, api):
            assert text == "x"
            break

    policy = gateway(server, agent)  # whose block ends at once: it waits for what is still to be recorded
    (segment,) = policy.recorder.segments(PROMPT)
    assert server.ended
    assert tuple(segment.token_ids.tolist())[-2:] == server.ids[:2]
    assert len(segment.log_probs) == 2
    assert (policy.progress.generating, policy.progress.finish_reason) == (0, "length")


def test_a_response_that_no_server_goes_on_with_is_an_error_in_mid_stream_and_trains_nothing() -> None:
    async def loses(request: Request) -> list[Reply]:
        assert request.stream is not None
        request.stream.tell([40, 41])
        assert not request.stream.tell([40, 42, 43]), "another server, and other tokens"
        return [Reply(request.rids[0], (40, 42), (-1.0, -1.0), (), "stop", (VersionSpan("0", 0, 2),))]

    async def agent(endpoint: Endpoint) -> None:
        for api in TEXTS:
            with pytest.raises(Exception, match="given up"):
                async for _ in texts(endpoint, api):
                    pass

    assert gateway(loses, agent).recorder.segments(PROMPT) == ()


async def watched_attempt(stream: TokenStream) -> None:
    """What a client does beside the events of an attempt, which ends before the listener has had enough."""
    watching = asyncio.create_task(stream.wait_stopped())
    await asyncio.sleep(0)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


def test_the_end_of_an_attempt_is_not_the_listeners_and_the_next_one_can_be_stopped() -> None:
    async def whole() -> None:
        stream = TokenStream(lambda _: None)
        await watched_attempt(stream)
        assert not stream.stopped
        again = asyncio.create_task(stream.wait_stopped())
        await asyncio.sleep(0)
        stream.stop()
        await asyncio.wait_for(again, 5)

    asyncio.run(whole())


def test_a_streamed_response_that_a_server_aborted_is_aborted_and_trains_nothing() -> None:
    """Nobody has left: as a response that the client had ended, it would be trained as a cut one."""

    async def aborts(request: Request) -> list[Reply]:
        assert request.stream is not None
        request.stream.tell([40, 41])
        await watched_attempt(request.stream)
        return [Reply(request.rids[0], (40, 41), (-1.0, -1.0), (), "abort", (VersionSpan("0", 0, 2),))]

    async def agent(endpoint: Endpoint) -> None:
        with pytest.raises(Exception, match="aborted the response"):
            async for _ in texts(endpoint, "chat"):
                pass

    policy = gateway(aborts, agent)
    assert policy.recorder.segments(PROMPT) == ()
    assert policy.progress.finish_reason == "abort"


def test_a_hundred_clients_that_leave_in_mid_stream_leave_nothing_behind() -> None:
    server = Steps("xyzzy<e>", cut=True)
    policy = policy_of(TOKENIZER, PROMPT, server, limits=replace(LIMITS, turns=100, seconds=60.0))

    async def leaves(http: aiohttp.ClientSession, endpoint: Endpoint) -> None:
        asked = {"model": "m", "messages": [ASK], "stream": True}
        headers = {"Authorization": f"Bearer {endpoint.key}"}
        async with http.post(f"{endpoint.openai_url}/chat/completions", json=asked, headers=headers) as said:
            while b'"x"' not in await said.content.readline():
                pass
            said.close()

    async def whole() -> None:
        async with serve_policy(policy) as endpoint, aiohttp.ClientSession() as http:
            await leaves(http, endpoint)
            before = await settled()
            for _ in range(9):
                await asyncio.gather(*(leaves(http, endpoint) for _ in range(11)))
            assert await settled() == before

    async def settled() -> tuple[int, int]:
        """Tasks and open files, when every response has been recorded."""
        for _ in range(200):
            await asyncio.sleep(0.02)
            if policy.progress.generating == 0 and len(asyncio.all_tasks()) <= 2:
                break
        return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))

    asyncio.run(asyncio.wait_for(whole(), 60))
    found = policy.recorder.segments(PROMPT)
    assert sum(len(one.log_probs) for one in found) == 100 * 2, "what they had seen, each once"


# -- what is shown ----------------------------------------------------------------------------------------

ANSWERS = [
    "plain<e>",
    "  spaces in  front, and behind  <e>",
    '<call>add {"a":1}</call><e>',
    'So: <call>add {"a":1}</call> and <call>add {"a":2}</call><e>',
    'So: <call>add {"a":}</call> no<e>',
    "cut <cal",
    "<",
    "",
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("parsed", [True, False])
def test_what_is_shown_in_pieces_is_the_beginning_of_the_whole_message(answer: str, parsed: bool) -> None:
    """With a parser and without, token by token: all of it, but for a call that cannot be read."""
    ids = TOKENIZER.encode(answer, add_special_tokens=False)
    template = ChatTemplate(TOKENIZER, response=RESPONSE if parsed else None)
    asked = AskedTurn([], None, PROMPT.text, list(PROMPT.token_ids))

    async def whole() -> tuple[str, str]:
        live = LiveTurn()
        live.begin(template, asked, 3)
        for token in ids:
            live.stream.tell([*live.stream._told, token])
        await asyncio.sleep(0)
        live.end()
        while await live.next() is not None:
            pass
        text = template.decode(ids)
        message: Any = {"content": text}
        if parsed:
            try:
                message = parse(template, asked, ids)
            except Exception:
                assert "}</call> no" in answer
        return live.given(message), message["content"]

    given, content = asyncio.run(whole())
    if parsed and "</call> and" in answer:  # of two texts the parser keeps the last
        assert (given, content) == ("So:", "and")
    else:
        assert given == content


# -- servers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Api]]:
    with embedded(save_chain(tmp_path_factory.mktemp("chain"))) as served:
        yield served


def params(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": 40, "sampling_seed": 3, "ignore_eos": True, **more}


def test_the_embedded_server_streams_what_it_answers_otherwise(chain: tuple[str, Api]) -> None:
    prompt = chat_prompt(chain_tokenizer()).token_ids

    async def ask(body: dict[str, Any]) -> list[Any]:
        async with aiohttp.ClientSession() as http, http.post(f"{chain[0]}/generate", json=body) as reply:
            raw = await reply.text()
        events = [part.removeprefix("data: ") for part in raw.split("\n\n") if part]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    async def whole() -> None:
        body = {"input_ids": [*prompt], "sampling_params": params(), "return_logprob": True, "stream": True}
        events = await ask(body)
        assert [len(event["output_ids"]) for event in events] == [*range(1, 41)] or len(events) < 40
        for event in events:
            count = len(event["output_ids"])
            assert event["output_ids"] == events[-1]["output_ids"][:count]
            assert event["meta_info"]["completion_tokens"] == count
            assert len(event["meta_info"]["output_token_logprobs"]) == count
        assert [one["meta_info"]["finish_reason"] is None for one in events[-2:]] == [True, False]
        every = await ask(body | {"sampling_params": params(stream_interval=16)})
        assert len(every) <= 4
        assert every[-1]["output_ids"] == events[-1]["output_ids"]
        async with aiohttp.ClientSession() as http:
            async with http.post(f"{chain[0]}/generate", json=body | {"stream": False}) as reply:
                assert (await reply.json())["output_ids"] == events[-1]["output_ids"]
            wrong = body | {"sampling_params": params(stream_interval=0)}
            async with http.post(f"{chain[0]}/generate", json=wrong) as reply:
                assert reply.status == 400
        both = await ask(body | {"input_ids": [[*prompt], [*prompt]], "sampling_params": params()})
        assert {event["index"] for event in both} == {0, 1}

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_a_client_that_hangs_up_ends_the_request_at_the_embedded_server(chain: tuple[str, Api]) -> None:
    run_hang_up(chain[0])
    engine = chain[1].worker.engine
    assert engine.running == []


def test_a_stream_is_told_once_whichever_server_tells_it() -> None:
    async def whole() -> None:
        heard: list[int] = []
        stream = TokenStream(heard.extend)
        assert stream.tell([1, 2])
        assert stream.tell([1]), "the next server begins anew, under the same seed"
        assert stream.tell([1, 2, 3])
        assert not stream.tell([1, 2, 4])
        await asyncio.sleep(0)
        assert (heard, stream.broken) == ([1, 2, 3], True)

    asyncio.run(whole())


def event(ids: list[int], total: int, *, scored: int | None = None, ends: bool = False) -> dict[str, Any]:
    entries = [[-0.5, token, None] for token in ids[:scored]]
    meta = {"id": "r~1", "completion_tokens": total, "output_token_logprobs": entries, "finish_reason": None}
    spans = [{"version": "0", "start": 0, "end": total}]
    ended = {"finish_reason": {"type": "stop"}, "weight_versions": spans}
    return {"output_ids": ids, "meta_info": meta | (ended if ends else {})}


@pytest.mark.parametrize(
    "events",
    [
        [event([7], 1), event([7, 8], 2), event([7, 8, 9], 3, ends=True)],
        [event([7], 1), event([8], 2), event([9], 3, ends=True)],
        [event([7, 8], 1), event([7, 8, 9], 2, scored=2), event([7, 8, 9], 3, ends=True)],
    ],
    ids=["cumulative", "incremental", "lists that grow while they are sent"],
)
def test_events_of_a_server_are_joined_whether_they_repeat_or_not(events: list[Any]) -> None:
    asked = Asked("r", "r~1", [1, 2], 8, 100)
    found = StreamedReply(asked)
    told = []
    for one in events:
        ended = found.add(one)
        told.append([*found.ids])
        assert ended is (one is events[-1])
    assert told == [[7], [7, 8], [7, 8, 9]]
    reply = parse_reply(found.whole(), asked)
    assert (reply.token_ids, reply.log_probs) == ((7, 8, 9), (-0.5,) * 3)


def test_an_event_that_cannot_be_joined_is_malformed() -> None:
    for wrong in (event([7], 3), event([7, 8], 2, scored=1), event([7, 200], 2), {"output_ids": [7]}, []):
        with pytest.raises(MalformedReplyError):
            StreamedReply(Asked("r", "r~1", [1], 8, 100)).add(wrong)
