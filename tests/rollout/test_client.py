"""The client's rules for deadlines, retries and replies, through a failing proxy before a real server."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from mcore_rl.errors import EXIT_CONFIG, EXIT_RETRYABLE, ConfigError, RolloutError
from mcore_rl.rollout import client as client_module
from mcore_rl.rollout import reply as reply_module
from mcore_rl.rollout.client import RejectedError, Reply, RolloutClient, call, reply_bytes
from mcore_rl.rollout.fleet import wait_ready
from mcore_rl.types import ExpertLayers, VersionSpan
from tests.rollout.proxy import Fault, Proxy, body, cut, damaged, hang, proxy, status
from tests.rollout.support import running, wait_until

PROMPTS = [[1, 2, 3], [4, 5]]
PARAMS = [{"max_new_tokens": 6, "sampling_seed": seed} for seed in (1, 2)]
RIDS = ["a", "b"]


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_BACKOFF_SECONDS", 0.005)


def generate(url: str, *, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[Reply]:
    options = {"timeout": 20.0, "retries": 2} | options
    return call(
        RolloutClient(url, **options), lambda c: c.generate(prompts, PARAMS, RIDS, prompt_log_probs=True)
    )


def through(url: str, *script: Fault, **options: Any) -> tuple[list[Reply] | RolloutError, Proxy]:
    """The outcome of a `generate` through a proxy with this script, and what the proxy saw."""

    async def run() -> tuple[list[Reply] | RolloutError, Proxy]:
        async with proxy(url, *script) as state:
            settings = {"timeout": 20.0, "retries": 2} | options
            async with RolloutClient(state.url, **settings) as client:
                try:
                    return await client.generate(PROMPTS, PARAMS, RIDS, prompt_log_probs=True), state
                except RolloutError as error:
                    return error, state

    return asyncio.run(run())


def test_replies_carry_tokens_log_probs_and_versions(url: str) -> None:
    replies = generate(url)
    assert [r.rid for r in replies] == RIDS
    for reply, prompt in zip(replies, PROMPTS, strict=True):
        assert len(reply.token_ids) == len(reply.log_probs) == 6
        assert len(reply.prompt_log_probs) == len(prompt) - 1
        assert reply.versions == (VersionSpan("default", 0, 6),)
        assert reply.finish_reason == "length"


@pytest.mark.parametrize(
    "fault",
    [
        *(status(code) for code in (500, 502, 503)),
        status(429),
        *(cut(share) for share in (0.0, 0.5, 0.99)),
        body(lambda raw: raw[: len(raw) // 2]),
        body(lambda raw: b""),
        body(lambda raw: b"[]"),
        body(lambda raw: b"[" * 100_000),
        body(lambda raw: raw.replace(b"-", b"NaN, -", 1)),
        damaged(lambda reply: reply.pop("output_ids")),
        damaged(lambda reply: reply["meta_info"].pop("output_token_logprobs")),
        damaged(lambda reply: reply["meta_info"]["output_token_logprobs"].pop()),
        damaged(lambda reply: reply["output_ids"].append(7)),
        damaged(lambda reply: reply["meta_info"]["output_token_logprobs"][0].__setitem__(0, None)),
        damaged(lambda reply: reply["meta_info"]["output_token_logprobs"][0].__setitem__(0, float("nan"))),
        damaged(lambda reply: reply["meta_info"]["input_token_logprobs"].pop()),
        damaged(lambda reply: reply["meta_info"]["weight_versions"].clear()),
        damaged(lambda reply: reply["meta_info"]["weight_versions"][0].update(end=5)),
        damaged(lambda reply: reply["meta_info"].update(id="other")),
        damaged(lambda reply: reply["meta_info"].update(finish_reason=None)),
    ],
)
def test_an_infrastructure_fault_is_retried_without_duplicates(url: str, fault: Fault) -> None:
    before = random.getstate()
    outcome, seen = through(url, fault)
    assert outcome == generate(url)
    assert random.getstate() == before, "a pause was drawn from what checkpoints hold"
    assert not seen.script, "the fault did not fire"
    first, second = (sent["rid"] for sent in seen.bodies("/generate"))
    assert [rid.partition("~")[0] for rid in first + second] == ["a", "b", "a", "b"]
    assert not set(first) & set(second), "the second attempt would be refused as a duplicate"
    paths = [path for path, _ in seen.calls]
    assert sorted(sent["rid"] for sent in seen.bodies("/abort_request")) == sorted(first)
    assert paths[0] == paths[-1] == "/generate", "the abort must come before the second attempt"


@pytest.mark.parametrize(
    ("ids", "same"),
    [([3, 9, 1], True), ([3, 0, 1], True), ([0, 9, 1], False), ([3, 8, 1], False), ([3, 9], False)],
)
def test_an_echoed_prompt_may_have_0_for_its_largest_id_only(ids: list[int], same: bool) -> None:
    """SGLang echoes the vocabulary's last id as 0."""
    assert reply_module._echoes(ids, [3, 9, 1]) is same


def test_retries_end_with_the_cause(url: str) -> None:
    outcome, seen = through(url, *[status(503)] * 3)
    assert isinstance(outcome, RolloutError)
    assert outcome.exit_code == EXIT_RETRYABLE
    assert "HTTP 503" in str(outcome)
    assert "3 attempts" in str(outcome)
    assert len(seen.bodies("/generate")) == 3


def test_retry_after_is_honoured(url: str) -> None:
    start = time.monotonic()
    outcome, _ = through(url, status(429, Retry_After="1"))
    assert outcome == generate(url)
    assert time.monotonic() - start >= 1
    late, seen = through(url, status(429, Retry_After="60"), timeout=5.0)
    assert isinstance(late, RolloutError)
    assert len(seen.bodies("/generate")) == 1
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("code", [400, 404, 413, 401, 307])
def test_a_refusal_is_not_retried(url: str, code: int) -> None:
    outcome, seen = through(url, status(code, Location="http://127.0.0.1:9/elsewhere"))
    assert isinstance(outcome, RejectedError)
    assert (outcome.status, outcome.exit_code) == (code, EXIT_CONFIG)
    assert len(seen.calls) == 1


PAGE = b"<!DOCTYPE html><html><head><title>Sign in\n to continue</title></head><body>...</body></html>"


def page(code: int) -> Fault:
    """What a proxy answers in the server's place."""
    return lambda request, raw: web.Response(status=code, body=PAGE, content_type="text/html")


@pytest.mark.parametrize("code", [201, 202, 204, 206])
def test_another_success_than_200_is_no_reply_of_a_server(url: str, code: int) -> None:
    outcome, seen = through(url, status(code))
    assert isinstance(outcome, RejectedError)
    assert (outcome.status, outcome.exit_code, len(seen.calls)) == (code, EXIT_CONFIG, 1)
    assert f"HTTP {code} where the API answers 200; something else than SGLang's API" in str(outcome)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (page(200), ["not JSON but a page, 'Sign in to continue'; something else than SGLang's API"]),
        (
            page(502),
            ["HTTP 502: a page, 'Sign in to continue'; a proxy says so: the server behind it is away"],
        ),
        (page(404), ["HTTP 404: a page, 'Sign in to continue'; something else than SGLang's API"]),
        (status(405), ["HTTP 405: scripted; something else than SGLang's API"]),
        (body(lambda raw: b'{"object": "list"}'), ['got {"object": "list"}; something else than SGLang\'s']),
        (body(lambda raw: b"[1, 2, 3]"), ["expected a list of 2 responses, got 3 of them; something else"]),
        (body(lambda raw: raw[:-3]), ["reply is not JSON: ", "; see the server's log, or raise"]),
        (status(503), ["HTTP 503: scripted; see the server's log, or raise"]),
    ],
)
def test_what_else_may_have_answered_is_said(url: str, fault: Fault, says: list[str]) -> None:
    outcome, _ = through(url, fault, retries=0)
    assert isinstance(outcome, RolloutError)
    assert all(part in str(outcome) for part in says), str(outcome)
    assert "<" not in str(outcome)


def test_a_port_that_does_not_speak_http_is_named() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        await writer.drain()
        writer.close()

    async def run() -> tuple[str, str | None]:
        async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with RolloutClient(url, retries=0) as client:
                with pytest.raises(RolloutError) as raised:
                    await client.generate(PROMPTS, PARAMS, RIDS)
                with pytest.raises(RolloutError) as waited:
                    await wait_ready([client], timeout=0.0)
                return str(raised.value), str(waited.value)

    for said in asyncio.run(run()):
        assert "something else than SGLang's API answers there" in said


def test_a_refusal_of_the_server_itself_gives_its_reason(url: str) -> None:
    with pytest.raises(RejectedError, match=r"context length \(512 tokens\)"):
        generate(url, prompts=[[1] * 600, [2]])


def test_a_hanging_server_costs_the_deadline_and_no_more(url: str) -> None:
    start = time.monotonic()
    outcome, _ = through(url, hang(60), timeout=0.7)
    assert isinstance(outcome, RolloutError)
    assert "0.7 s" in str(outcome)
    assert 0.6 < time.monotonic() - start < 5


def test_a_reply_that_is_too_long_is_refused(url: str) -> None:
    with pytest.raises(RolloutError, match=r"reply longer than 100 bytes, its limit \(max_reply_bytes\)"):
        generate(url, max_reply_bytes=100)


def test_a_reply_may_be_as_long_as_what_was_asked_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte was the limit: 16 samples of 32768 tokens with the experts of Qwen3-30B-A3B are more."""
    of_30b = ExpertLayers(experts=128, per_token=8, sparse=(True,) * 48)
    assert reply_bytes(1024, 32768, of_30b) * 16 > 1 << 30

    def ask(client: RolloutClient) -> Awaitable[list[Reply]]:
        return client.generate([[1, 2]], [{"max_new_tokens": 400, "ignore_eos": True}], ["x"])

    monkeypatch.setattr(client_module, "_SMALL_REPLY_BYTES", 0)
    assert len(call(RolloutClient(url), ask)[0].token_ids) == 400
    monkeypatch.setattr(client_module, "_TOKEN_BYTES", 8)
    with pytest.raises(
        RolloutError, match="reply longer than 6432 bytes, twice what the tokens that were asked"
    ):
        call(RolloutClient(url), ask)


def test_no_server_is_an_error_within_the_deadline() -> None:
    start = time.monotonic()
    with pytest.raises(RolloutError, match="3 attempts"):
        generate("http://127.0.0.1:9")
    assert time.monotonic() - start < 10


def test_the_key_goes_with_every_request_and_into_no_message(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUT_TEST_KEY", "canary-secret")
    client = RolloutClient(url, api_key_env="ROLLOUT_TEST_KEY", retries=0)
    with pytest.raises(RejectedError) as refused:
        call(client, lambda c: c.generate([[]], [{}], ["x"]))
    assert "canary" not in f"{refused.value} {client!r} {vars(client)}"
    monkeypatch.delenv("ROLLOUT_TEST_KEY")
    with pytest.raises(ConfigError, match="ROLLOUT_TEST_KEY"):
        call(client, lambda c: c.ready())


def test_weights_and_state_through_the_client(fresh_url: str, dir_b: Path, tmp_path: Path) -> None:
    async def use(client: RolloutClient) -> None:
        before = await client.weight_checksums()
        await client.pause("retract")
        with pytest.raises(RejectedError, match="safetensors"):
            await client.update_weights_from_disk(str(tmp_path), "bad")
        assert await client.weight_checksums() == before
        await client.update_weights_from_disk(str(dir_b), "7")
        await client.resume()
        assert await client.weight_checksums() != before
        assert (await client.model_info())["weight_version"] == "7"
        assert "mcore_rl" in (await client.server_info())["version"]
        assert await client.ready()
        assert (await client.generate([[1]], [{"max_new_tokens": 1}], ["z"]))[0].versions[0].version == "7"

    call(RolloutClient(fresh_url), use)


@pytest.mark.parametrize("fault", [status(503), cut(0.5), body(lambda raw: b""), body(lambda raw: b"{}")])
def test_an_update_whose_answer_was_lost_is_asked_for_again(
    fresh_url: str, dir_b: Path, fault: Fault
) -> None:
    """The server may have done it already: twice is the same. Only `success: false` is a refusal."""

    async def run(*script: Fault) -> Proxy:
        async with proxy(fresh_url, *script, path="/update_weights_from_disk") as seen:
            async with RolloutClient(seen.url, timeout=20.0, retries=2) as client:
                await client.update_weights_from_disk(str(dir_b), "7")
                assert (await client.model_info())["weight_version"] == "7"
            return seen

    assert len(asyncio.run(run(fault)).bodies("/update_weights_from_disk")) == 2
    with pytest.raises(RejectedError, match="scripted"):
        asyncio.run(run(body(lambda raw: b'{"success": false, "message": "scripted"}')))


def test_an_aborted_request_is_a_reply(fresh_url: str) -> None:
    async def use(client: RolloutClient) -> list[Reply]:
        long = {"max_new_tokens": 400, "ignore_eos": True}
        asked = asyncio.create_task(client.generate([[1], [2]], [long, long], ["x", "y"]))
        await asyncio.to_thread(wait_until, lambda: running(fresh_url) == 2, "both are sampled")
        await client.pause("abort")
        await client.resume()
        return await asked

    replies = call(RolloutClient(fresh_url), use)
    assert [r.finish_reason for r in replies] == ["abort", "abort"]
    assert all(len(r.token_ids) == len(r.log_probs) < 400 for r in replies)
