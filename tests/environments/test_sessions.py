"""Rollouts that go on after a crash: nothing that was sampled is lost, and nothing is sampled twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from mcore_rl.environments.dialogue import ChatTemplate
from mcore_rl.environments.load import load_environment
from mcore_rl.environments.run import Environment, Environments
from mcore_rl.environments.sessions import SessionClass
from mcore_rl.errors import ConfigError, DamagedCheckpointError
from mcore_rl.rollout.dispatch import Request
from mcore_rl.rollout.inflight import PendingGroup
from mcore_rl.rollout.reply import Reply
from mcore_rl.rollout.saved import check_group, group_to_json, kept_rollouts
from mcore_rl.types import Sample, VersionSpan
from tests.environments.support import LIMITS, RESPONSE, build_tokenizer, chat_prompt, check_trained_once

TOKENIZER = build_tokenizer()
PROMPT = chat_prompt(TOKENIZER)
HERE = "tests.environments.test_sessions"
TURNS = 5


class Counts:
    """Five turns, whose messages and number are its state."""

    def __init__(self, *, step: int = 1) -> None:
        self.messages: list[Any] = [*PROMPT.messages]
        self.count, self.step = 0, step

    async def rollout(self, policy, prompt):
        while self.count < TURNS:
            turn = await policy.generate(self.messages)
            self.count += self.step
            self.messages += [turn.message, {"role": "user", "content": f"turn {self.count}"}]
        return float(self.count)

    def state(self) -> Any:
        return {"messages": self.messages, "count": self.count}

    def restore(self, state: Any) -> None:
        self.messages, self.count = state["messages"], state["count"]


class NoState:
    async def rollout(self, policy, prompt):
        return None


class HalfState(NoState):
    def state(self):
        return None


class NotAsync:
    def rollout(self, policy, prompt):
        return None


class Strange(Counts):
    def restore(self, state: Any) -> None:
        raise KeyError("what I knew")


class Log:
    """Answers with the number of the request; waits for ever from request `stop` of a rollout on."""

    def __init__(self, stop: dict[str, int]) -> None:
        self.stop, self.seen = stop, dict[str, list[tuple[list[int], Reply]]]()
        self.requests: list[str] = []

    async def __call__(self, request: Request) -> list[Reply]:
        rid = request.affinity
        seen = self.seen.setdefault(rid, [])
        self.requests.append(request.rids[0])
        if len(seen) == self.stop.get(rid, -1):
            await asyncio.sleep(600)
        seed = request.sampling_params[0]["sampling_seed"]
        ids = tuple(TOKENIZER.encode(f"{seed % 97}<e>", add_special_tokens=False))
        reply = Reply(request.rids[0], ids, (-0.5,) * len(ids), (), "stop", (VersionSpan("3", 0, len(ids)),))
        seen.append(([*request.prompts[0]], reply))
        return [reply]


def request_of(resumed: dict[str, Any]) -> Request:
    params = [{"max_new_tokens": 8, "sampling_seed": k} for k in range(3)]
    names = [f"p@1/{k}" for k in range(3)]
    return Request([PROMPT.token_ids] * 3, params, names, None, PROMPT, resumed=resumed)


def play(type: Callable[..., Any], log: Log, resumed: dict[str, Any], *, crash: bool) -> Any:
    """The samples of a group; or, where it crashes, what a checkpoint has of it, as it is read again."""

    async def whole() -> Any:
        template = ChatTemplate(TOKENIZER, response=RESPONSE)
        limits = replace(LIMITS, seconds=60.0, tokens=2000)
        environments = Environments(Environment("m:f", SessionClass(type, {}), template, limits, {}))
        request = request_of(resumed)
        task = asyncio.create_task(environments.play(request, log))
        try:
            if not crash:
                return await task
            await asyncio.sleep(1.0)
            group = PendingGroup("p@1", 3, request, None, await environments.states(request.rids))
            saved = json.loads(json.dumps(group_to_json(group)))
            check_group(saved, len(TOKENIZER), None)
            return saved
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.to_thread(environments.close)

    return asyncio.run(asyncio.wait_for(whole(), 60))


def test_rollouts_go_on_behind_their_last_turn_as_if_nothing_had_happened() -> None:
    """One had ended, one was in mid-dialogue, and one waited for its first response."""
    alone = Log({})
    unbroken: list[Sample] = play(Counts, alone, {}, crash=False)
    before = Log({"p@1/1": 2, "p@1/2": 0})
    saved = play(Counts, before, {}, crash=True)
    assert {id: sorted(one) for id, one in saved["played"].items()} == {
        "p@1/0": ["prompt", "sample"],
        "p@1/1": ["asked", "prompt", "state", "turns"],
        "p@1/2": ["asked", "prompt", "state", "turns"],
    }
    after = Log({})
    resumed = dict(kept_rollouts(saved, version=3, max_staleness=0, prompt=PROMPT))
    samples: list[Sample] = play(Counts, after, resumed, crash=False)
    left = [name for name in alone.requests if name[:5] == "p@1/2" or name[:6] == "p@1/1#"]
    assert sorted(after.requests) == sorted(set(left) - {"p@1/1#1"}), "the third turn is asked again"
    for sample, same in zip(samples, unbroken, strict=True):
        log = [*before.seen.get(sample.id, []), *after.seen.get(sample.id, [])]
        check_trained_once(sample.segments, log)
        assert len(log) == TURNS
        assert (sample.reward, sample.text, len(sample.segments)) == (5.0, same.text, 1)
        assert sample.segments[0].token_ids.tolist() == same.segments[0].token_ids.tolist()
    kept = partial(kept_rollouts, saved, max_staleness=1)
    assert kept(version=5, prompt=PROMPT) == {}, "too old to be trained"
    for other in (chat_prompt(TOKENIZER, "3+3?"), replace(PROMPT, label="5")):
        assert kept(version=4, prompt=other) == {}, "another prompt, of the same id"
    assert len(kept(version=4, prompt=PROMPT)) == 3


def test_what_has_no_state_begins_again_and_a_restore_that_fails_is_void() -> None:
    saved = play(NoState, Log({}), {}, crash=True)
    assert all("turns" not in one for one in saved.get("played", {}).values())
    saved = play(Counts, Log({f"p@1/{k}": 2 for k in range(3)}), {}, crash=True)
    samples = play(Strange, Log({}), saved["played"], crash=False)
    assert {sample.failure[0] for sample in samples} == {"restore"}
    assert all(
        sample.failure[1].startswith("restore raised KeyError: 'what I knew' at ") for sample in samples
    )


class Says(Counts):
    """Its state is whatever it is told; it goes on when the policy refuses."""

    said: Any = None

    def state(self) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said

    async def rollout(self, policy, prompt):
        with suppress(Exception):
            await policy.generate(self.messages)
        return 1.0


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (TypeError("no such thing"), "no such thing"),
        ({1, 2}, "not JSON serializable"),
        (float("nan"), "Out of range float"),
        ({"a": [{1: 2}]}, "with the key 1"),
        ("x" * (9 << 20), "more than 8388608"),
        (nested(100_000), "maximum recursion"),
    ],
    ids=["raises", "set", "nan", "key", "huge", "deep"],
)
def test_a_state_that_cannot_be_kept_makes_its_rollout_void_whatever_the_environment_makes_of_it(
    said: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Says, "said", said)
    log = Log({})
    samples: list[Sample] = play(Says, log, {}, crash=False)
    for sample in samples:
        assert sample.void
        assert sample.failure is not None
        assert sample.failure[0] == "state"
        assert why in sample.failure[1]
    assert log.requests == []


def test_a_checkpoint_of_another_model_is_refused() -> None:
    saved = play(Counts, Log({f"p@1/{k}": 2 for k in range(3)}), {}, crash=True)
    with pytest.raises(DamagedCheckpointError):
        check_group(saved, 10, None)
    saved["played"]["p@1/0"]["asked"] = 0
    with pytest.raises(DamagedCheckpointError, match="more turns"):
        check_group(saved, len(TOKENIZER), None)


def test_a_class_that_cannot_be_an_environment_is_named() -> None:
    found = load_environment(f"{HERE}:Counts", {"step": 2})
    assert isinstance(found, SessionClass)
    assert found.restorable
    assert not SessionClass(NoState, {}).restorable
    for name, arguments, what in (
        ("Counts", {"stride": 1}, "stride"),
        ("HalfState", {}, "write both"),
        ("NotAsync", {}, "no async rollout"),
    ):
        with pytest.raises(ConfigError, match=what):
            load_environment(f"{HERE}:{name}", arguments)
