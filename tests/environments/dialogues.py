"""Rollouts of real agents against a real server, and the proof that its own outputs are what is trained."""

from __future__ import annotations

import asyncio
import random

import httpx2

from mcore_rl.environments.gateway import serve_policy
from mcore_rl.environments.policy import RolloutLimits
from mcore_rl.rollout.dispatch import Dispatch, Request
from mcore_rl.rollout.reply import Reply
from tests.environments.agents import CHAIN_VOCAB, RawClient, agents, chain_tokenizer
from tests.environments.support import chat_prompt, check_trained_once, policy_of

LIMITS = RolloutLimits(turns=200, tokens=2048, seconds=600.0, turn_seconds=600.0)
_AT_ONCE = 8


async def check_agents(client: RawClient, count: int) -> None:
    """`count` rollouts, in each of which an agent of either package calls tools, streamed or not."""
    tokenizer = chain_tokenizer()
    prompt = chat_prompt(tokenizer)
    most: list[int] = []

    async def rollout(k: int, dispatch: Dispatch, https: list[httpx2.AsyncClient]) -> None:
        log: list[tuple[list[int], Reply]] = []
        affinities: set[str] = set()

        async def logged(request: Request) -> list[Reply]:
            (reply,) = await dispatch.ask(request)
            affinities.add(request.affinity)
            log.append(([*request.prompts[0]], reply))
            assert reply.token_ids == client.raw[request.rids[0]], "what the server wrote"
            return [reply]

        policy = policy_of(tokenizer, prompt, logged, limits=LIMITS, rid=f"d{k}")
        async with serve_policy(policy) as endpoint:
            most.append(await agents(endpoint, https, random.Random(k)))
        check_trained_once(policy.recorder.segments(prompt), log)
        assert policy.dialogue.rewritten == 0
        assert affinities == {f"d{k}"}
        assert len(log) >= 2

    async with (
        Dispatch([client], version="default", health_timeout=60.0) as dispatch,
        httpx2.AsyncClient(timeout=120) as one,
        httpx2.AsyncClient(timeout=120) as two,
    ):
        for start in range(0, count, _AT_ONCE):
            part = range(start, min(start + _AT_ONCE, count))
            await asyncio.gather(*(rollout(k, dispatch, [one, two]) for k in part))
    assert max(most) > 1, "the control: calls of one turn side by side"
    assert len(client.raw) > 3 * count, "the control: turns after calls"


def run_agents(url: str, count: int, *, api_key_env: str | None = None) -> RawClient:
    """Raises AssertionError; the client, with all that it was sent."""
    client = RawClient(url, timeout=120.0, vocabulary=CHAIN_VOCAB, api_key_env=api_key_env)
    asyncio.run(asyncio.wait_for(check_agents(client, count), 120 + 3 * count))
    return client
