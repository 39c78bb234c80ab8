"""Rollouts of an environment in flight as JSON, for a checkpoint: finished samples of several segments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mcore_rl.rollout import experts as routing
from mcore_rl.rollout.reply import check_spans, check_tokens
from mcore_rl.types import Prompt, RewardPart, Sample, Segment, TurnReward, VersionSpan


def is_sample(saved: Mapping[str, Any]) -> bool:
    """Whether a saved reply is a sample of an environment, and no server's reply."""
    return "segments" in saved


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """Everything but the prompt; tokens and log-probs as memory."""
    return {
        "id": sample.id,
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "reward": sample.reward,
        "void": sample.void,
        "parts": sample.parts,
        "turn_rewards": sample.turn_rewards,
        "failure": sample.failure,
        "segments": [_segment_to_json(segment) for segment in sample.segments],
    }


def sample_from_json(saved: Mapping[str, Any], prompt: Prompt) -> Sample:
    """The sample of `sample_to_json`. Raises KeyError, TypeError, ValueError where it is none."""
    return Sample(
        id=saved["id"],
        prompt=prompt,
        segments=tuple(_segment_from_json(segment) for segment in saved["segments"]),
        text=saved["text"],
        finish_reason=saved["finish_reason"],
        reward=saved["reward"],
        void=saved["void"],
        parts=tuple(RewardPart(*part) for part in saved["parts"]),
        turn_rewards=tuple(TurnReward(*turn) for turn in saved["turn_rewards"]),
        failure=None if saved["failure"] is None else tuple(saved["failure"]),
    )


def check_sample(saved: Mapping[str, Any], vocabulary: int) -> None:
    """Raises MalformedReplyError, ValueError for what a policy of that vocabulary cannot have sampled."""
    for segment in map(_segment_from_json, saved["segments"]):
        trained = np.asarray(segment.token_ids)
        if segment.trained is not None:
            trained = trained[segment.trained]
        check_tokens(trained.tolist(), np.asarray(segment.log_probs).tolist(), vocabulary)
        everything = [*np.asarray(segment.context).tolist(), *np.asarray(segment.token_ids).tolist()]
        if not everything or min(everything) < 0 or max(everything) >= vocabulary:
            raise ValueError("a token that is no id of the model's")
        check_spans([span._asdict() for span in segment.versions], len(segment.log_probs))


def _segment_to_json(segment: Segment) -> dict[str, Any]:
    arrays = {
        "context": np.asarray(segment.context, np.int32),
        "token_ids": np.asarray(segment.token_ids, np.int32),
        "log_probs": np.asarray(segment.log_probs, np.float32),
    } | ({} if segment.trained is None else {"trained": segment.trained.astype(np.uint8)})
    versions = [span._asdict() for span in segment.versions]
    return {"versions": versions} | {name: routing.to_json(array) for name, array in arrays.items()}


def _segment_from_json(saved: Mapping[str, Any]) -> Segment:
    names = ("context", "token_ids", "log_probs", "trained")
    arrays = {name: routing.from_json(saved[name]) for name in names if name in saved}
    trained = arrays.get("trained")
    return Segment(
        arrays["context"],
        arrays["token_ids"],
        arrays["log_probs"],
        tuple(VersionSpan(**span) for span in saved["versions"]),
        None if trained is None else trained.astype(np.bool_),
    )
