"""Rewards of services over HTTP: real servers, whose replies are sound, late, wrong or absent."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from aiohttp import web

from mcore_rl.errors import ConfigError
from mcore_rl.rewards import RewardFunction, RewardPool, Task, Void
from mcore_rl.rewards.remote import classify, judge, remote
from mcore_rl.types import Group
from tests.rewards.test_functions import group

KEY, KEY_ENV = "canary-key-of-a-grader", "MCORE_RL_TEST_GRADER_KEY"
Answer = Callable[[Any, int], Any]
"""(what was sent, how many calls came before) -> JSON, or a web.Response, or seconds to wait for"""


class Grader:
    """What came to it, and where it is."""

    def __init__(self) -> None:
        self.url = ""
        self.sent: list[tuple[float, Any, str]] = []


@contextmanager
def grader(answer: Answer) -> Iterator[Grader]:
    """A server in a thread of its own."""
    found, loop = Grader(), asyncio.new_event_loop()

    async def handle(request: web.Request) -> web.StreamResponse:
        sent = await request.json()
        said = answer(sent, len(found.sent))
        found.sent.append((time.monotonic(), sent, request.headers.get("Authorization", "")))
        if isinstance(said, float):
            await asyncio.sleep(said)
        return said if isinstance(said, web.Response) else web.json_response(said)

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/{path:.*}", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield found
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def of(answer: Answer, *texts: str, reward: Any = remote, path: str = "", **args: Any) -> list[Any]:
    """What the reward says of a group of these texts."""
    with grader(answer) as there:
        return asyncio.run(reward(asked(*texts), url=there.url + path, **args))


def asked(*texts: str) -> Group:
    made = group("a", *texts, data_source="x", day=date(2026, 1, 2))
    prompt = replace(
        made.samples[0].prompt,
        text="<user>2+2",
        label="4",
        messages=[{"role": "user", "content": "2+2"}],
    )
    return replace(made, samples=tuple(replace(sample, prompt=prompt) for sample in made.samples))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)
    monkeypatch.setattr("mcore_rl.rewards.service._BACKOFF_SECONDS", 0.02)


def test_a_service_is_sent_what_a_function_sees_and_its_rewards_are_those_of_a_function() -> None:
    rewards = iter([1.5, {"a": 1.0, "b": [0.5]}, {"1": 2.0}, None])

    def answer(sent: Any, _: int) -> Any:
        return {"void": "no grader"} if sent["response"] == "void" else {"reward": next(rewards)}

    with grader(answer) as there:
        said = asyncio.run(remote(asked("x", "y", "z", "w", "void"), url=there.url, concurrent=1))
    assert said[:4] == [1.5, {"a": 1.0, "b": [0.5]}, {1: 2.0}, None]
    assert said[4].reason == "no grader"
    assert there.sent[0][1] == {
        "id": "a@0/0",
        "prompt": "<user>2+2",
        "messages": [{"role": "user", "content": "2+2"}],
        "response": "x",
        "label": "4",
        "metadata": {"data_source": "x", "day": "2026-01-02"},
        "finish_reason": "stop",
    }


def broken(status: int, text: str = "no", **headers: str) -> web.Response:
    return web.Response(
        status=status, text=text, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


@pytest.mark.parametrize(
    ("answer", "reason", "said"),
    [
        (lambda sent, before: broken(500), "failed", "HTTP 500: no, 2 times"),
        (lambda sent, before: broken(422, "bad\x1b"), "refused", "HTTP 422: bad"),
        (lambda sent, before: broken(302, Location="/x"), "refused", "HTTP 302"),
        (lambda sent, before: broken(200, "{"), "reply", "no JSON: {"),
        (lambda sent, before: broken(200, "[" * 100_000), "reply", "no JSON"),
        (lambda sent, before: broken(200, "x" * (17 << 20)), "reply", "more than 16 MiB"),
        (lambda sent, before: [1.0], "reply", "neither reward nor void"),
        (lambda sent, before: 5.0, "timeout", "no reply within 0.9 s"),
    ],
)
def test_a_service_without_a_usable_reply_costs_the_sample(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, reason: str, said: str
) -> None:
    monkeypatch.setenv("MCORE_RL_REWARD_TIMEOUT", "1")
    (void,) = of(answer, "x", retries=1)
    assert isinstance(void, Void)
    assert void.reason == reason
    assert said in void.why


def test_what_another_attempt_can_help_is_asked_again() -> None:
    def answer(_: Any, before: int) -> Any:
        return broken(503) if before == 0 else broken(429, Retry_After="1") if before == 1 else {"reward": 1}

    began = time.monotonic()
    assert of(answer, "x") == [1]
    assert time.monotonic() - began > 1.0, "as long as it was told to wait"
    (void,) = asyncio.run(remote(asked("x"), url="http://127.0.0.1:9/", retries=1))
    assert void.reason == "unreachable"


def test_calls_keep_the_rate_and_run_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCORE_RL_REWARD_PROCESSES", "2")
    with grader(lambda sent, before: {"reward": 1}) as there:
        asyncio.run(remote(asked(*"abcde"), url=there.url, per_second=20.0))
    times = [moment for moment, _, _ in there.sent]
    assert times[-1] - times[0] > 0.38, "five calls of one of two processes at 20 a second are 0.1 s apart"
    began = time.monotonic()
    assert of(lambda sent, before: 0.3, *"abcd") != []
    assert time.monotonic() - began < 1.0


def test_a_key_is_sent_and_is_in_no_message() -> None:
    def answer(_: Any, before: int) -> Any:
        return broken(401, f"who is {KEY}")

    with grader(answer) as there:
        (void,) = asyncio.run(remote(asked("x"), url=there.url, key_env=KEY_ENV))
    assert there.sent[0][2] == f"Bearer {KEY}"
    assert "who is ***" in void.why
    assert KEY not in void.why
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
        asyncio.run(remote(asked("x"), url="http://127.0.0.1:9/", key_env="NO_SUCH_KEY"))


def chat(content: Any) -> Any:
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("Fine.\nScore: 7", 0.7),
        ("score = 3, no: **Score:** 10", 1.0),
        ("Score: 2.5/10", 0.25),
        ("Score: 11", "unparsed"),
        ("Score: -1", "unparsed"),
        ("Score: 1e5", "unparsed"),
        ("Score: 1E400", "unparsed"),
        ("Score: 5e-1, low", 0.05),
        ("Score: 1,000", "unparsed"),
        ("Score: 1.2.3", "unparsed"),
        ("Score: 1e55.3", "unparsed"),
        ("Score: 8, 2 of them for style.", 0.8),
        ("Score: 8.", 0.8),
        ("ten points", "unparsed"),
        ("", "unparsed"),
        (None, "reply"),
    ],
)
def test_the_last_score_of_a_judge_counts(content: Any, wanted: float | str) -> None:
    (said,) = of(lambda sent, before: chat(content), "x", reward=judge, model="m")
    assert (said.reason if isinstance(said, Void) else said) == wanted


def test_a_judge_is_shown_the_conversation_the_answer_and_the_label_as_they_are() -> None:
    args = {
        "template": "{prompt}|{response}|{label}|{other}",
        "score": r"(\d) of 5",
        "high": 5.0,
        "max_tokens": 9,
    }
    with grader(lambda sent, before: chat("4 of 5")) as there:
        said = asyncio.run(judge(asked(r"\frac{1}{label}"), url=f"{there.url}/v1", model="m", **args))
    assert said == [0.8]
    assert there.sent[0][1] == {
        "model": "m",
        "messages": [{"role": "user", "content": r"user: 2+2|\frac{1}{label}|4|{other}"}],
        "max_tokens": 9,
        "temperature": 0.0,
    }


@pytest.mark.parametrize("wrong", [{"template": "no"}, {"score": "("}, {"score": "a"}, {"low": 10.0}])
def test_a_judge_that_cannot_be_asked_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="judge: "):
        asyncio.run(judge(asked("x"), url="http://127.0.0.1:9/v1", model="m", **wrong))


@pytest.mark.parametrize("reply", [{}, [], [{"embedding": []}, {}], [{"embedding": [1.0, 2.0]}] * 2, "x"])
def test_what_is_no_score_of_a_classifier_costs_the_samples(reply: Any) -> None:
    said = of(lambda sent, before: reply, "x", "y", reward=classify)
    assert [void.reason for void in said] == ["reply"] * 2


def test_in_a_pool_the_deadline_of_a_service_comes_before_that_of_its_process() -> None:
    """Each sample by itself, and no process is lost."""

    def answer(sent: Any, _: int) -> Any:
        return 30.0 if sent["response"] == "slow" else {"reward": 2.0}

    with grader(answer) as there:
        args = {"url": there.url}
        function = RewardFunction("mcore_rl.rewards.remote:remote", "grader", 0.5, arguments=args)
        with RewardPool(Task((function,), {}, 8.0, None, timeout=4.0), workers=1) as pool:
            pool.score([asked("warm")])
            (scored,), reasons = pool.score([asked("a", "slow", "b")])
    assert [sample.reward for sample in scored.samples] == [1.0, None, 1.0]
    assert reasons.counts == {"timeout": 1}
    assert "no reply within 3.6 s" in reasons.examples[0]


@pytest.mark.parametrize(
    ("url", "args", "said"),
    [
        ("http://x", {"concurrent": 0}, "concurrent: 0; give an integer of at least 1"),
        ("http://x", {"retries": -1}, "retries: -1; give an integer of at least 0"),
        ("http://x", {"retries": "3"}, "retries: '3'; give"),
        ("http://x", {"per_second": -1.0}, "per_second: -1.0; give"),
        ("grader:8000", {}, "url: 'grader:8000' is no address; begin it with http"),
        ("", {}, "url: '' is no address"),
    ],
)
def test_what_would_ask_nothing_or_wait_for_ever_is_refused_at_once(url, args, said) -> None:
    with pytest.raises(ConfigError, match=said):
        asyncio.run(asyncio.wait_for(remote(asked("x"), url=url, **args), 5))


def test_a_place_of_many_digits_is_no_exception_that_takes_the_group_along() -> None:
    assert of(lambda *_: {"reward": {"1" * 5000: 1.0}}, "x") == [{"1" * 5000: 1.0}]
