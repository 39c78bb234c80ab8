"""What an environment does to its rollout makes a reward, or a void sample with a reason."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mcore_rl.environments.dialogue import ChatTemplate
from mcore_rl.environments.policy import LimitReached, RolloutLimits
from mcore_rl.environments.run import Environment, Environments
from mcore_rl.errors import BlockedLoopError, RolloutError
from mcore_rl.rewards import Void
from mcore_rl.rollout.columns import pack_groups, unpack_groups
from mcore_rl.rollout.dispatch import Request
from mcore_rl.rollout.reply import Reply
from mcore_rl.rollout.saved_samples import check_sample, is_sample, sample_from_json, sample_to_json
from mcore_rl.types import Group, RewardPart, Sample, TurnReward, VersionSpan
from tests.environments.support import LIMITS, build_tokenizer, chat_prompt

TOKENIZER = build_tokenizer()
PROMPT = chat_prompt(TOKENIZER)
SAID = tuple(TOKENIZER.encode("42<e>", add_special_tokens=False))


async def answers(request: Request) -> list[Reply]:
    """A server that takes a moment, and always says 42."""
    await asyncio.sleep(0.001)
    spans = (VersionSpan("0", 0, len(SAID)),)
    return [Reply(rid, SAID, (-0.5,) * len(SAID), (), "stop", spans) for rid in request.rids]


def play(
    function: Callable[..., Coroutine[Any, Any, Any]],
    *,
    samples: int = 1,
    ask: Callable = answers,
    limits: RolloutLimits = LIMITS,
    weights: dict[str, float] | None = None,
) -> list[Sample]:
    """The rollouts of one group."""
    made = Environment("m:f", function, ChatTemplate(TOKENIZER), limits, weights or {})
    environments = Environments(made)
    ids = [f"p@1/{k}" for k in range(samples)]
    params = [{"max_new_tokens": 8, "sampling_seed": k} for k in range(samples)]
    request = Request([PROMPT.token_ids] * samples, params, ids, None, PROMPT)
    try:
        return asyncio.run(asyncio.wait_for(environments.play(request, ask), 30))
    finally:
        environments.close()
        assert "mcore_rl-environments" not in {t.name for t in threading.enumerate()} or function is blocks


async def right(policy, prompt):
    turn = await policy.generate(prompt.messages)
    return float(turn.text == "42")


async def by_turn(policy, prompt):
    for _ in range(2):
        turn = await policy.generate([*prompt.token_ids, 40])
        await policy.generate([*turn.prompt_ids, *turn.token_ids, 41])
    return {"turns": [1.0, 0.0, 0.5, 2.0], "form": 3}


async def unscored(policy, prompt):
    await policy.generate(prompt.messages)


async def without_end(policy, prompt):
    messages = [*prompt.messages]
    while True:
        turn = await policy.generate(messages)
        messages += [turn.message, {"role": "user", "content": "more"}]


async def catches(policy, prompt):
    try:
        await without_end(policy, prompt)
    except LimitReached:
        return -1.0


async def in_a_group(policy, prompt):
    async with asyncio.TaskGroup() as group:
        group.create_task(without_end(policy, prompt))


async def in_other_words(policy, prompt):
    try:
        await without_end(policy, prompt)
    except LimitReached as error:
        raise OSError("400 bad request") from error


def one(function: Callable, **options: Any) -> Sample:
    (sample,) = play(function, **options)
    return sample


def test_an_outcome_is_what_a_reward_function_may_return() -> None:
    sample = one(right)
    assert (sample.reward, sample.void, sample.text, sample.finish_reason) == (1.0, False, "42", "stop")
    sample = one(by_turn, weights={"form": 2.0})
    assert sample.reward == 9.5
    assert sample.parts == (RewardPart("turns", 3.5, 1.0), RewardPart("form", 3.0, 2.0))
    size = len(SAID)
    turns = [(size - 1, 1.0), (2 * size - 1, 0.0), (3 * size - 1, 0.5), (4 * size - 1, 8.0)]
    assert sample.turn_rewards == tuple(TurnReward(*turn) for turn in turns)
    assert [segment.token_ids.tolist() for segment in sample.segments] == [[*SAID, 41, *SAID]] * 2
    left = one(unscored)
    assert (left.reward, left.void, left.failure) == (None, False, None)


def test_a_rollout_that_has_had_its_turns_is_truncated_and_worth_nothing_unless_it_says_so() -> None:
    for function, reward in ((without_end, 0.0), (in_a_group, 0.0), (in_other_words, 0.0), (catches, -1.0)):
        sample = one(function)
        assert (sample.reward, sample.finish_reason, sample.void) == (reward, "length", False)
        assert sample.trained_tokens == LIMITS.turns * len(SAID)


async def raises(policy, prompt):
    await policy.generate(prompt.messages)
    raise KeyError("gone")


async def exits(policy, prompt):
    raise SystemExit(3)


async def cancels(policy, prompt):
    raise asyncio.CancelledError


async def hangs(policy, prompt):
    await policy.generate(prompt.messages)
    await asyncio.sleep(60)


async def will_not_go(policy, prompt):
    while True:
        try:
            await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            await asyncio.sleep(0.1)
            return 1.0


async def void(policy, prompt):
    return Void("sandbox", "its container is gone")


async def nothing(policy, prompt):
    return 1.0


async def nan(policy, prompt):
    await policy.generate(prompt.messages)
    return float("nan")


async def strange(policy, prompt):
    await policy.generate(prompt.messages)
    return {"a": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("function", "reason", "why"),
    [
        (raises, "raised", "KeyError"),
        (exits, "raised", "SystemExit: 3"),
        (cancels, "raised", "CancelledError"),
        (hangs, "timeout", "a turn of the environment took longer than 0.3 s"),
        (will_not_go, "timeout", "a turn of the environment"),
        (void, "sandbox", "its container is gone"),
        (nothing, "empty", "before anything was sampled"),
        (nan, "returned", "NaN"),
        (strange, "returned", "2 rewards, and the sample has 1 turns"),
    ],
)
def test_a_rollout_that_fails_is_void_with_its_reason(function, reason: str, why: str) -> None:
    sample = one(function, limits=replace(LIMITS, turn_seconds=0.3))
    assert (sample.void, sample.reward) == (True, None)
    assert sample.failure is not None
    assert sample.failure[0] == reason
    assert why in sample.failure[1]
    (again,) = unpack_groups(pack_groups([Group("p@1", (sample,))]), {"p": PROMPT})
    assert again.samples[0].void


def test_the_whole_rollout_has_a_deadline_that_waiting_for_the_model_counts_against() -> None:
    async def never(request: Request) -> list[Reply]:
        await asyncio.sleep(60)
        return []

    limits = replace(LIMITS, seconds=0.3, turn_seconds=0.1)
    sample = one(right, ask=never, limits=limits)
    assert sample.failure == ("timeout", "the rollout took longer than 0.3 s")


def test_a_server_that_is_gone_ends_the_run_whatever_the_environment_makes_of_it() -> None:
    async def gone(request: Request) -> list[Reply]:
        raise RolloutError("no rollout server is left")

    async def swallows(policy, prompt):
        try:
            await policy.generate(prompt.messages)
        except Exception:
            return 1.0

    with pytest.raises(RolloutError, match="no rollout server"):
        play(swallows, ask=gone, samples=3)


def test_an_aborted_response_is_an_aborted_sample() -> None:
    async def aborted(request: Request) -> list[Reply]:
        return [replace((await answers(request))[0], finish_reason="abort")]

    assert one(right, ask=aborted).finish_reason == "abort"


async def blocks(policy, prompt):
    time.sleep(3)


def test_an_environment_that_keeps_the_loop_ends_the_run_with_its_line(monkeypatch) -> None:
    monkeypatch.setattr("mcore_rl.environments.run._LEAST_BLOCKED_SECONDS", 0.6)
    with pytest.raises(BlockedLoopError, match=r"test_run.py:\d+; wait by `await`"):
        play(blocks, limits=replace(LIMITS, turn_seconds=0.5))


def test_hundreds_of_rollouts_run_side_by_side_and_a_cancelled_group_leaves_none() -> None:
    """Each waits 50 ms twice, which one after another would be a minute."""
    at_once = 0
    most = 0
    left = 0

    async def slow(policy, prompt):
        nonlocal at_once, most, left
        at_once += 1
        most = max(most, at_once)
        try:
            for _ in range(2):
                await asyncio.sleep(0.05)
                await policy.generate(prompt.token_ids)
            return 1.0
        finally:
            at_once -= 1
            left += 1

    samples = play(slow, samples=500)
    assert most == 500
    assert {sample.reward for sample in samples} == {1.0}

    async def cancelled() -> None:
        environments = Environments(Environment("m:f", slow, ChatTemplate(TOKENIZER), LIMITS, {}))
        params = [{"max_new_tokens": 8, "sampling_seed": 0}] * 20
        names = [f"q/{k}" for k in range(20)]
        request = Request([PROMPT.token_ids] * 20, params, names, None, PROMPT)
        task = asyncio.create_task(environments.play(request, answers))
        await asyncio.sleep(0.03)
        assert at_once == 20
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        environments.close()

    asyncio.run(cancelled())
    assert at_once == 0
    assert left == 520


def test_a_sample_in_flight_survives_a_checkpoint() -> None:
    for function in (by_turn, raises, unscored):
        sample = one(function)
        saved = sample_to_json(sample)
        assert is_sample(saved)
        check_sample(saved, len(TOKENIZER))
        again = sample_from_json(saved, PROMPT)
        assert sample_to_json(again) == saved
        assert [np.asarray(s.token_ids).tolist() for s in again.segments] == [
            np.asarray(s.token_ids).tolist() for s in sample.segments
        ]
        with pytest.raises(Exception, match="no id"):
            check_sample(saved, 10)
