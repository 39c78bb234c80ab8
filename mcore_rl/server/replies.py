"""The JSON of /generate replies, field by field as SGLang 0.5.23 writes it."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import PreTrainedTokenizerBase

from mcore_rl.server.sequence import Sequence

Entry = list[Any]
"""[log-prob or null, token id, null]: the text is never returned"""


def generate_reply(sequence: Sequence, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """The reply of a finished sequence; with a tokenizer also its `text`, without the stop token."""
    reply: dict[str, Any] = {"output_ids": sequence.output_ids, "meta_info": _meta(sequence)}
    if tokenizer is not None:
        stopped = sequence.finish_reason is not None and sequence.finish_reason["type"] == "stop"
        shown = sequence.output_ids[:-1] if stopped else sequence.output_ids
        reply["text"] = tokenizer.decode(shown, skip_special_tokens=sequence.wanted.skip_special_tokens)
    return reply


def streamed_reply(
    sequence: Sequence, sampled: tuple[list[int], list[float]], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """What a sequence that is still sampled has until now; its weight versions are told at its end."""
    ids, log_probs = sampled
    meta: dict[str, Any] = {
        "id": sequence.id,
        "finish_reason": None,
        "prompt_tokens": len(sequence.prompt),
        "completion_tokens": len(ids),
        "cached_tokens": sequence.num_cached,
    }
    if sequence.wanted.log_probs:
        chosen = zip(log_probs, ids, strict=True)
        meta["output_token_logprobs"] = [[value, token, None] for value, token in chosen]
    reply: dict[str, Any] = {"output_ids": ids, "meta_info": meta}
    if tokenizer is not None:
        reply["text"] = tokenizer.decode(ids, skip_special_tokens=sequence.wanted.skip_special_tokens)
    return reply


def _meta(sequence: Sequence) -> dict[str, Any]:
    meta = {
        "id": sequence.id,
        "finish_reason": sequence.finish_reason,
        "prompt_tokens": len(sequence.prompt),
        "completion_tokens": len(sequence.output_ids),
        "cached_tokens": sequence.num_cached,
        "cached_tokens_details": {"device": sequence.num_cached, "host": 0} if sequence.num_cached else None,
        "reasoning_tokens": 0,
        "weight_version": sequence.final_version,
        "weight_versions": [{"version": v, "start": start, "end": end} for v, start, end in sequence.spans()],
        "num_retractions": sequence.num_retractions,
        "dp_rank": None,
        "e2e_latency": time.monotonic() - sequence.created,
        "response_sent_to_client_ts": time.time(),
    }
    if sequence.experts:
        meta["routed_experts"] = sequence.experts
    return meta | _log_probs(sequence) if sequence.wanted.log_probs else meta


def _log_probs(sequence: Sequence) -> dict[str, Any]:
    wanted = sequence.wanted
    chosen = zip(sequence.log_probs, sequence.output_ids, strict=True)
    fields: dict[str, Any] = {
        "input_token_logprobs": _prompt_entries(sequence),
        "output_token_logprobs": [[value, token, None] for value, token in chosen],
        "output_token_logprobs_length": len(sequence.output_ids),
    }
    for name, count in (("top", wanted.top), ("token_ids", len(wanted.token_ids))):
        if count:
            prompt, output = getattr(sequence.prompt_details, name), getattr(sequence.output_details, name)
            rows = [None, *map(_entries, prompt[wanted.prompt_from :])] if wanted.prompt_from >= 0 else []
            fields[f"input_{name}_logprobs"] = rows
            fields[f"output_{name}_logprobs"] = [*map(_entries, output)]
    return fields


def _prompt_entries(sequence: Sequence) -> list[Entry]:
    """From `prompt_from` on; the first has no log-prob, as in SGLang, because its context is not scored."""
    start = sequence.wanted.prompt_from
    if start < 0:
        return []
    values = [None, *sequence.prompt_log_probs[start:]]
    return [[value, token, None] for value, token in zip(values, sequence.prompt[start:], strict=True)]


def _entries(pairs: list[tuple[float, int]]) -> list[Entry]:
    """A masked token has no finite log-prob: null, since JSON has no infinity."""
    return [[value if math.isfinite(value) else None, token, None] for value, token in pairs]
