"""Groups in flight as JSON, for a checkpoint.

A sample in flight is a server's reply to a prompt, which becomes one segment, or a rollout of an environment
(saved_samples.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from mcore_rl.errors import DamagedCheckpointError
from mcore_rl.rollout import experts as routing
from mcore_rl.rollout.inflight import PendingGroup
from mcore_rl.rollout.reply import FINISH_REASONS, MalformedReplyError, Reply, check_spans, check_tokens
from mcore_rl.rollout.saved_samples import check_sample, is_sample, sample_from_json, sample_to_json
from mcore_rl.terminal import quoted, short
from mcore_rl.types import ExpertLayers, Prompt, Sample, VersionSpan


def group_to_json(group: PendingGroup) -> dict[str, Any]:
    """A group, with its replies where it has finished; what asks for it follows from its id."""
    to_json = lambda one: sample_to_json(one) if isinstance(one, Sample) else reply_to_json(one)  # noqa: E731
    replies = group.replies and [to_json(reply) for reply in group.replies]
    played = {"played": dict(group.played)} if group.played else {}
    return {"id": group.id, "version": group.version, "replies": replies} | played


def step_of(saved: Mapping[str, Any]) -> int:
    """The step that a saved group was asked for, as its name says: `<prompt id>@<step>[.<refill>]`."""
    return int(saved["id"].rpartition("@")[2].partition(".")[0])


def kept_replies(
    saved: Mapping[str, Any],
    *,
    version: int,
    max_staleness: int,
    max_new_tokens: int,
    routed: bool,
    played: Prompt | None = None,
) -> list[Reply] | list[Sample] | None:
    """The replies that a saved group keeps while `version` serves; None where it must be asked again.

    A group is asked again where it had not finished, where this run's bound, another one than that of the
    checkpoint, makes it too old, where a reply is longer than this run's limit, where this run replays
    experts (`routed`) and its replies name none, or where one of the two has an environment and one has not.

    Args:
        played: the prompt of the group, where this run has an environment.
    """
    replies = saved["replies"]
    if replies is None or is_too_old(saved, version, max_staleness):
        return None
    if any(is_sample(reply) != (played is not None) for reply in replies):
        return None
    if played is not None:
        return [sample_from_json(reply, played) for reply in replies]
    if routed and any(r.get("experts") is None and r["finish_reason"] != "abort" for r in replies):
        return None
    if any(np.prod(reply["token_ids"]["shape"]) > max_new_tokens for reply in replies):
        return None
    return [reply_from_json(reply, routed=routed) for reply in replies]


def kept_rollouts(
    saved: Mapping[str, Any], *, version: int, max_staleness: int, prompt: Prompt
) -> Mapping[str, Any]:
    """What a saved group that had not finished keeps of its rollouts.

    Nothing where it is too old, or where its prompt is another one now, of the same id.
    """
    if is_too_old(saved, version, max_staleness):
        return {}
    of = prompt_digest(prompt)
    return {id: one for id, one in saved.get("played", {}).items() if one.get("prompt", of) == of}


def prompt_digest(prompt: Prompt) -> str:
    """What a rollout was of: the prompt's tokens and its label."""
    text = json.dumps([list(prompt.token_ids), prompt.label])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def check_group(saved: Mapping[str, Any], vocabulary: int, experts: ExpertLayers | None) -> None:
    """The rules of a server's reply, for a group of a checkpoint; every rank reads all of them.

    Raises:
        DamagedCheckpointError: on every rank, for a sample that the policy cannot have sampled.
    """
    try:
        step_of(saved)
        if type(saved["version"]) is not int:
            raise ValueError("its version is no number")
        for played in saved.get("played", {}).values():
            _check_rollout(played, vocabulary)
        for reply in saved["replies"] or ():
            if is_sample(reply):
                check_sample(reply, vocabulary)
                continue
            read = reply_from_json(reply, routed=experts is not None)
            if read.finish_reason not in FINISH_REASONS:
                raise ValueError(f"it ended by {quoted(read.finish_reason)}")
            check_tokens(read.token_ids, read.log_probs, vocabulary)
            check_spans(reply["versions"], len(read.token_ids))
            if experts is not None and read.experts is not None:
                routing.check_experts(read.experts, experts)
    except (MalformedReplyError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"the checkpoint's sample in flight {short(saved.get('id'))} is none of this model "
            f"({short(error)}); go on from --resume previous, or from the model that it was sampled from"
        ).on_every_rank() from error


def _check_rollout(saved: Mapping[str, Any], vocabulary: int) -> None:
    """The same for a rollout that had begun."""
    if "sample" in saved:
        return check_sample(saved["sample"], vocabulary)
    if type(saved["asked"]) is not int or len(saved["turns"]) > saved["asked"]:
        raise ValueError("it has more turns than it asked for")
    for turn in saved["turns"]:
        reply = reply_from_json(turn["reply"], routed=False)
        check_tokens(reply.token_ids, reply.log_probs, vocabulary)
        check_spans(turn["reply"]["versions"], len(reply.token_ids))
        ids = routing.from_json(turn["ids"]).tolist()
        if not ids or min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError("a prompt that is none of the model's")
    return None


def is_too_old(saved: Mapping[str, Any], version: int, max_staleness: int) -> bool:
    """Whether a saved group could not be trained in its step, while `version` serves."""
    return saved["version"] < max(step_of(saved) - 1, version) - max_staleness


def reply_to_json(reply: Reply) -> dict[str, Any]:
    """Tokens and log-probs as memory, in the types of a Sample: every rank holds them for a moment."""
    arrays = {
        "token_ids": np.array(reply.token_ids, np.int32),
        "log_probs": np.array(reply.log_probs, np.float32),
    } | ({} if reply.experts is None else {"experts": reply.experts})
    rest = asdict(replace(reply, token_ids=(), log_probs=(), versions=(), experts=None))
    rest["versions"] = [span._asdict() for span in reply.versions]
    return rest | {name: routing.to_json(array) for name, array in arrays.items()}


def reply_from_json(saved: Mapping[str, Any], *, routed: bool) -> Reply:
    """The reply of `reply_to_json`; with its experts where this run replays them (`routed`)."""
    experts = saved.get("experts")
    return Reply(
        rid=saved["rid"],
        token_ids=tuple(routing.from_json(saved["token_ids"]).tolist()),
        log_probs=tuple(routing.from_json(saved["log_probs"]).tolist()),
        prompt_log_probs=tuple(saved["prompt_log_probs"]),
        finish_reason=saved["finish_reason"],
        versions=tuple(VersionSpan(**span) for span in saved["versions"]),
        experts=routing.from_json(experts) if routed and experts is not None else None,
    )
