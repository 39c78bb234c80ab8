"""Rollouts whose agents leave in mid-stream, against a real server."""

from __future__ import annotations

import asyncio
from typing import Any

from mcore_rl.environments.gateway import serve_policy
from mcore_rl.rollout.dispatch import Dispatch, Request
from mcore_rl.rollout.reply import Reply
from tests.environments.agents import ASK, CHAIN_VOCAB, RawClient, chain_tokenizer, openai_client
from tests.environments.dialogues import LIMITS as LONG
from tests.environments.support import chat_prompt, check_trained_once, policy_of


async def hang_up(client: RawClient) -> None:
    """Rollouts whose agent reads one piece of a long answer and goes on with something else."""
    tokenizer = chain_tokenizer()
    prompt = chat_prompt(tokenizer)
    async with Dispatch([client], version="default", health_timeout=60.0) as dispatch:

        async def rollout(k: int) -> None:
            log: list[tuple[list[int], Reply]] = []

            async def logged(request: Request) -> list[Reply]:
                (reply,) = await dispatch.ask(request)
                log.append(([*request.prompts[0]], reply))
                return [reply]

            endless = {"max_new_tokens": 1500, "ignore_eos": True}
            policy = policy_of(tokenizer, prompt, logged, rid=f"h{k}", sampling=endless, limits=LONG)
            async with serve_policy(policy) as endpoint, openai_client(endpoint) as chat:
                chunks: Any = await chat.chat.completions.create(model="m", messages=[ASK], stream=True)  # type: ignore[list-item]
                async for chunk in chunks:
                    if chunk.choices[0].delta.content:
                        break
                await chunks.close()
                said: Any = await chat.chat.completions.create(model="m", messages=[ASK], max_tokens=4)  # type: ignore[list-item]
                assert said.choices[0].finish_reason
            segments = policy.recorder.segments(prompt)
            check_trained_once(segments, log)
            assert len(log) == 2
            (cut,) = (reply for _, reply in log if reply.finish_reason == "abort")
            assert 0 < len(cut.token_ids) < 1500
            assert client.aborted[cut.rid] == cut.token_ids, "what the server wrote"

        await asyncio.gather(*(rollout(k) for k in range(3)))


def run_hang_up(url: str, **options: Any) -> None:
    client = RawClient(url, timeout=60.0, vocabulary=CHAIN_VOCAB, **options)
    asyncio.run(asyncio.wait_for(hang_up(client), 120))
