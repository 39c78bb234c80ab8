"""Prompts to groups of samples."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mcore_rl.rollout.client import Reply, reply_bytes
from mcore_rl.rollout.dispatch import Request
from mcore_rl.types import ExpertLayers, Group, Prompt, Sample

_SAMPLES_PER_CALL = 1024
_BYTES_PER_CALL = 1 << 28
"""of a reply, as far as whole prompts allow: it is held several times over while it is read"""


def sample_seed(run_seed: int, sample_id: str) -> int:
    """63-bit seed of one sample: the same whichever replica or server asks, and after a resume."""
    digest = hashlib.blake2b(f"{run_seed}:{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


async def sample_groups(
    ask: Callable[[Request], Awaitable[list[Reply]]],
    prompts: Sequence[Prompt],
    *,
    step: int | str,
    samples_per_prompt: int,
    sampling_params: Mapping[str, Any],
    tokenizer_decode: Callable[[Sequence[int]], str],
    seed: int,
    calls: int = 1,
    experts: ExpertLayers | None = None,
) -> list[Group]:
    """Return a group `<prompt id>@<step>` per prompt, in their order, of up to `samples_per_prompt` samples.

    A sample that the server aborted is in no group; a group may be empty.

    Prompts go to `ask` in few large calls, at least `calls` where there are as many prompts; servers batch
    what they get, and the samples of a prompt stay together, so that its prefix is computed once.
    `sampling_params` are SGLang's (max_new_tokens, temperature, ...); a seed per sample is added, which acts
    where the server samples deterministically. `experts`: of the model, to have samples say which of them
    their tokens were sent to. Raises RolloutError, RejectedError.
    """
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    each = samples_per_prompt * reply_bytes(longest, sampling_params.get("max_new_tokens", 128), experts)
    most = min(_SAMPLES_PER_CALL // samples_per_prompt, _BYTES_PER_CALL // max(1, each))
    size = max(1, min(most, -(-len(prompts) // calls)))
    chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]

    def request(chunk: Sequence[Prompt]) -> Request:
        return group_request(
            [(p, f"{p.id}@{step}") for p in chunk],
            samples_per_prompt,
            sampling_params,
            seed=seed,
            experts=experts,
        )

    replies = [
        reply for part in await asyncio.gather(*(ask(request(chunk)) for chunk in chunks)) for reply in part
    ]
    groups = []
    for i, prompt in enumerate(prompts):
        mine = replies[i * samples_per_prompt : (i + 1) * samples_per_prompt]
        groups.append(build_group(f"{prompt.id}@{step}", prompt, mine, tokenizer_decode))
    return groups


def group_request(
    groups: Sequence[tuple[Prompt, str]],
    samples_per_prompt: int,
    sampling_params: Mapping[str, Any],
    *,
    seed: int,
    experts: ExpertLayers | None = None,
) -> Request:
    """One call for all samples of these (prompt, group id), each with the seed that its id gives it."""
    asked = [(p, f"{group_id}/{k}") for p, group_id in groups for k in range(samples_per_prompt)]
    params = [{**sampling_params, "sampling_seed": sample_seed(seed, sample_id)} for _, sample_id in asked]
    return Request([p.token_ids for p, _ in asked], params, [sample_id for _, sample_id in asked], experts)


def build_group(
    group_id: str, prompt: Prompt, replies: Sequence[Reply], decode: Callable[[Sequence[int]], str]
) -> Group:
    """The samples of one prompt, without those that the server aborted."""
    samples = (_sample(reply, prompt, decode) for reply in replies if reply.finish_reason != "abort")
    return Group(group_id, tuple(samples))


def _sample(reply: Reply, prompt: Prompt, decode: Callable[[Sequence[int]], str]) -> Sample:
    return Sample(
        id=reply.rid,
        prompt=prompt,
        token_ids=np.array(reply.token_ids, np.int32),
        log_probs=np.array(reply.log_probs, np.float32),
        text=decode(reply.token_ids),
        finish_reason=reply.finish_reason,
        versions=reply.versions,
        experts=reply.experts,
    )
