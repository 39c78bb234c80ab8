"""Prompts to groups through a real server."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from mcore_rl.rollout import sampler
from mcore_rl.rollout.client import RolloutClient, call, reply_bytes
from mcore_rl.rollout.dispatch import join
from mcore_rl.rollout.sampler import build_group, group_request, sample_seed
from mcore_rl.types import Group, Prompt, VersionSpan
from tests.rollout.proxy import proxy
from tests.rollout.support import http, running, wait_until

PROMPTS = [Prompt(f"p{i}", f"w{i} w3", (i, 3), label="") for i in range(6)]


def decode(ids: object) -> str:
    return str(list(ids))  # type: ignore[call-overload]


async def ask(
    client: RolloutClient, prompts: list[Prompt] = PROMPTS, *, step: int = 4, seed: int = 1, **params: int
) -> list[Group]:
    """Four samples of every prompt, in as few calls as there may be."""
    sampling = {"max_new_tokens": 5} | params
    asked = [group_request(p, f"{p.id}@{step}", 4, sampling, seed=seed) for p in prompts]
    size = sampler.groups_per_call(prompts, 4, sampling)
    calls = [join(asked[i : i + size]) for i in range(0, len(asked), size)]
    parts = await asyncio.gather(*(client.generate(c.prompts, c.sampling_params, c.rids) for c in calls))
    replies = [reply for part in parts for reply in part]
    return [
        build_group(f"{p.id}@{step}", p, replies[4 * i : 4 * i + 4], decode) for i, p in enumerate(prompts)
    ]


def test_groups_hold_every_sample_once_with_its_origin(url: str) -> None:
    groups = call(RolloutClient(url), ask)
    assert [group.id for group in groups] == [f"{p.id}@4" for p in PROMPTS]
    for group, prompt in zip(groups, PROMPTS, strict=True):
        assert [sample.id for sample in group.samples] == [f"{group.id}/{k}" for k in range(4)]
        for sample in group.samples:
            assert sample.prompt is prompt
            assert len(sample.token_ids) == len(sample.log_probs) > 0
            assert sample.text == decode(np.asarray(sample.token_ids).tolist())
            assert sample.segments[0].versions == (VersionSpan("default", 0, len(sample.token_ids)),)
            assert sample.reward is None
            for array in (sample.token_ids, sample.log_probs, sample.prompt.token_array):
                assert not array.flags.writeable


def test_samples_depend_on_seed_and_step_but_not_on_who_asks(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens(*rounds: list[Group]) -> list[tuple[int, ...]]:
        return [tuple(s.token_ids) for groups in rounds for group in groups for s in group.samples]

    client = RolloutClient(url)
    whole = tokens(call(client, ask))
    halves = tokens(call(client, lambda c: ask(c, PROMPTS[:2])), call(client, lambda c: ask(c, PROMPTS[2:])))
    monkeypatch.setattr(sampler, "_SAMPLES_PER_CALL", 8)
    assert whole == halves == tokens(call(client, ask))
    assert whole != tokens(call(client, lambda c: ask(c, seed=2)))
    assert whole != tokens(call(client, lambda c: ask(c, step=5)))
    assert len(set(whole)) > 20, "samples of a group repeat each other"


def test_a_call_asks_for_no_more_than_a_reply_may_hold(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def calls() -> int:
        async with proxy(url) as seen, RolloutClient(seen.url) as client:
            assert len(await ask(client)) == 6
            return len(seen.bodies("/generate"))

    assert asyncio.run(calls()) == 1
    monkeypatch.setattr(sampler, "_BYTES_PER_CALL", 2 * 4 * reply_bytes(2, 5))
    assert asyncio.run(calls()) == 3, "two prompts with four samples each"
    monkeypatch.setattr(sampler, "_BYTES_PER_CALL", 1)
    assert asyncio.run(calls()) == 6, "a prompt stays whole"


def test_aborted_samples_are_in_no_group(fresh_url: str) -> None:
    async def use() -> list[Group]:
        async with proxy(fresh_url) as seen, RolloutClient(seen.url) as client:
            asked = asyncio.create_task(ask(client, max_new_tokens=400, ignore_eos=True))
            await asyncio.to_thread(wait_until, lambda: running(fresh_url) == 24, "all are sampled")
            for rid in (rid for sent in seen.bodies("/generate") for rid in sent["rid"]):
                if rid.partition("~")[0] in ("p2@4/0", "p2@4/3", "p5@4/1"):
                    await asyncio.to_thread(http, fresh_url, "/abort_request", {"rid": rid})
            return await asked

    groups = asyncio.run(use())
    assert [len(group.samples) for group in groups] == [4, 4, 2, 4, 4, 3]
    assert [s.id for s in groups[2].samples] == ["p2@4/1", "p2@4/2"]


def test_seeds_are_63_bit_and_differ() -> None:
    seeds = {sample_seed(0, f"p@{step}/{k}") for step in range(100) for k in range(8)}
    assert len(seeds) == 800
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert max(seeds) > 1 << 61
