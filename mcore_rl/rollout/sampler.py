"""Prompts to groups of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mcore_rl.rollout.client import Reply, reply_bytes
from mcore_rl.rollout.dispatch import Request
from mcore_rl.types import ExpertLayers, Group, Prompt, Sample

_SAMPLES_PER_CALL = 1024
_BYTES_PER_CALL = 1 << 28
"""bytes of a reply, as far as whole prompts allow: it is held several times over while it is read"""


def sample_seed(run_seed: int, sample_id: str) -> int:
    """63-bit seed of one sample: the same whichever replica or server asks, and after a resume."""
    digest = hashlib.blake2b(f"{run_seed}:{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def groups_per_call(
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    sampling_params: Mapping[str, Any],
    *,
    calls: int = 1,
    experts: ExpertLayers | None = None,
) -> int:
    """How many of these prompts one call asks for, where all of them are waited for; 1 or more.

    Calls are few and large, since servers batch what they get; there are at least `calls` where there are as
    many prompts, and none asks for more than its reply may hold. The samples of a prompt stay together, so
    that its prefix is computed once.
    """
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    each = samples_per_prompt * reply_bytes(longest, sampling_params.get("max_new_tokens", 128), experts)
    most = min(_SAMPLES_PER_CALL // samples_per_prompt, _BYTES_PER_CALL // max(1, each))
    return max(1, min(most, -(-len(prompts) // calls)))


def group_request(
    prompt: Prompt,
    group_id: str,
    samples: int,
    sampling_params: Mapping[str, Any],
    *,
    seed: int,
    experts: ExpertLayers | None = None,
) -> Request:
    """What asks for all samples of one group, each with the seed that its id gives it.

    Args:
        sampling_params: SGLang's (max_new_tokens, temperature, ...). The seed acts where the server samples
            deterministically.
        experts: those of the model, to have samples say which of them their tokens were sent to.
    """
    ids = [f"{group_id}/{k}" for k in range(samples)]
    params = [{**sampling_params, "sampling_seed": sample_seed(seed, sample_id)} for sample_id in ids]
    return Request([prompt.token_ids] * samples, params, ids, experts, prompt)


def build_group(
    group_id: str, prompt: Prompt, replies: Sequence[Reply | Sample], decode: Callable[[Sequence[int]], str]
) -> Group:
    """The samples of one prompt, without those that the server aborted."""
    alive = (reply for reply in replies if reply.finish_reason != "abort")
    samples = (one if isinstance(one, Sample) else _sample(one, prompt, decode) for one in alive)
    return Group(group_id, tuple(samples))


def _sample(reply: Reply, prompt: Prompt, decode: Callable[[Sequence[int]], str]) -> Sample:
    return Sample.of_response(
        id=reply.rid,
        prompt=prompt,
        token_ids=np.array(reply.token_ids, np.int32),
        log_probs=np.array(reply.log_probs, np.float32),
        text=decode(reply.token_ids),
        finish_reason=reply.finish_reason,
        versions=reply.versions,
        experts=reply.experts,
    )
