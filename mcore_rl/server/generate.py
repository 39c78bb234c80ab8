"""POST /generate: from the request body to sequences for the engine."""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from mcore_rl.server.bodies import MAX_VALUES
from mcore_rl.server.schema import (
    MAX_SEQUENCES,
    NEUTRAL_GENERATE,
    GenerateBody,
    RequestError,
    SamplingParams,
    check_names,
    parse_sampling,
    supported,
)
from mcore_rl.server.sequence import Limits, Sequence, Wanted, copy_seed


@dataclass(frozen=True)
class ModelLimits:
    """What a request must respect to be served at all."""

    vocab_size: int
    context_length: int
    """tokens of prompt and response together"""
    eos_ids: frozenset[int]
    has_experts: bool = False


@dataclass(frozen=True)
class GenerateRequest:
    """A parsed request."""

    sequences: list[Sequence]
    """prompt-major: the n copies of a prompt are neighbours"""
    batch: bool
    """The reply is a list: a batch of prompts, or n > 1."""
    stream: bool = False
    """It is told while it is sampled."""


def parse_generate(
    body: Mapping[str, Any],
    limits: ModelLimits,
    tokenizer: PreTrainedTokenizerBase | None,
    seeds: random.Random,
) -> GenerateRequest:
    """Raises RequestError for what cannot be served, pydantic's ValidationError for what is malformed."""
    acting = supported(body, NEUTRAL_GENERATE, "")
    check_names(acting, GenerateBody)
    request = GenerateBody.model_validate(acting)
    prompts, batch = _prompts(request, tokenizer)
    count = len(prompts)
    if not count:  # nothing would ever finish
        raise RequestError("text has no prompt; send at least one")
    rids = (
        _each(request.rid, count, "rid") if request.rid is not None else [uuid.uuid4().hex for _ in prompts]
    )
    if len(set(rids)) != count:
        raise RequestError("rid must be a list of different ids, one per prompt of the batch")
    if isinstance(request.sampling_params, list):
        params = [
            parse_sampling(fields) for fields in _each(request.sampling_params, count, "sampling_params")
        ]
    else:
        params = [parse_sampling(request.sampling_params)] * count
    log_probs = _each(request.return_logprob, count, "return_logprob")
    starts = _each(request.logprob_start_len, count, "logprob_start_len")
    tops = _each(request.top_logprobs_num, count, "top_logprobs_num")
    ids = _token_ids(request.token_ids_logprob, count, batch)
    sequences: list[Sequence] = []
    values = 0
    for prompt, rid, param, scored, start, top, shown in zip(
        prompts, rids, params, log_probs, starts, tops, ids, strict=True
    ):
        every = (param.stream_interval or 1) if request.stream else 0
        hidden = Wanted(skip_special_tokens=param.skip_special_tokens, stream_every=every)
        wanted = (
            replace(hidden, log_probs=True, prompt_from=start, top=top, token_ids=shown) if scored else hidden
        )
        wanted = replace(wanted, experts=request.return_routed_experts)
        _check(prompt, param, wanted, limits)
        values += param.n * _values(prompt, param, wanted)
        _check_size(len(sequences) + param.n, values)
        sequences += _sequences(prompt, rid, param, wanted, limits, seeds, request.routing_key or "")
    return GenerateRequest(sequences, batch or len(sequences) > 1, request.stream)


def _prompts(
    request: GenerateBody, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[list[int]], bool]:
    if request.text is not None:
        if tokenizer is None:
            raise RequestError("text needs a tokenizer in the model directory; send input_ids")
        texts = request.text if isinstance(request.text, list) else [request.text]
        _check_size(len(texts), sum(map(len, texts)))
        return [_tokens(tokenizer, text) for text in texts], isinstance(request.text, list)
    ids: list[Any] = request.input_ids or []
    batch = bool(ids) and isinstance(ids[0], list)
    prompts = ids if batch else [ids]
    _check_size(len(prompts), sum(map(len, prompts)))
    return prompts, batch


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        return tokenizer(text)["input_ids"]
    except Exception as error:  # a tokenizer raises Exception itself, for a character that it lacks for one
        raise RequestError(
            f"the tokenizer cannot encode the text ({str(error)[:200]}); change it, or send input_ids"
        ) from error


def _values(prompt: list[int], params: SamplingParams, wanted: Wanted) -> int:
    """What one response makes the server hold beyond its tokens: stop ids, and log-probs to be shown."""
    shown = (len(prompt) + params.max_new_tokens) * (wanted.top + len(wanted.token_ids))
    return len(params.stop_token_ids or ()) + shown + (len(prompt) if wanted.prompt_from >= 0 else 0)


def _check_size(sequences: int, values: int) -> None:
    """Raises RequestError for more than one request may hold; what follows costs time for each."""
    if sequences > MAX_SEQUENCES:
        raise RequestError(f"more than {MAX_SEQUENCES} responses in one request; send several")
    if values > MAX_VALUES:
        raise RequestError(
            f"one request may hold {MAX_VALUES} token ids, characters of text, stop ids of all responses "
            "and log-probs to be shown; send several, or ask for fewer"
        )


def _each(value: Any, count: int, name: str) -> list[Any]:
    """One value per prompt: a list as it is, a single value for all."""
    if not isinstance(value, list):
        if name == "rid" and count > 1:
            raise RequestError("rid must be a list of different ids, one per prompt of the batch")
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} has {len(value)} entries for {count} prompts.")
    return value


def _token_ids(value: list[Any] | None, count: int, batch: bool) -> list[tuple[int, ...]]:
    if not value:
        return [()] * count
    if not batch:
        value = [value]
    if not all(isinstance(ids, list) for ids in value):
        raise RequestError("token_ids_logprob must be a list of lists for a batch.")
    return [tuple(ids) for ids in _each(value, count, "token_ids_logprob")]


def _check(prompt: list[int], params: SamplingParams, wanted: Wanted, limits: ModelLimits) -> None:
    context, vocab = limits.context_length, limits.vocab_size
    if not prompt:
        raise RequestError("The prompt is empty; send at least one token id.")
    if len(prompt) >= context:
        raise RequestError(
            f"The input ({len(prompt)} tokens) is longer than the model's context length ({context} tokens)."
        )
    if len(prompt) + params.max_new_tokens > context:
        raise RequestError(
            f"Requested token count exceeds the model's maximum context length of {context} tokens: "
            f"{len(prompt)} of the prompt and {params.max_new_tokens} of max_new_tokens; lower either."
        )
    if wanted.experts and not limits.has_experts:
        raise RequestError("return_routed_experts: the model has no experts; drop it.")
    scored = [*wanted.token_ids, *(params.stop_token_ids or [])]
    for what, ids in (("input_ids", prompt), ("token_ids_logprob and stop_token_ids", scored)):
        if ids and not (min(ids) >= 0 and max(ids) < vocab):
            raise RequestError(f"{what} must be in [0, {vocab}), got {min(ids)} to {max(ids)}.")
    if not -1 <= wanted.prompt_from < len(prompt):
        raise RequestError(f"logprob_start_len must be -1 or a prompt position, got {wanted.prompt_from}.")
    if not 0 <= wanted.top <= vocab:
        raise RequestError(f"top_logprobs_num must be in [0, {vocab}], got {wanted.top}.")


def _sequences(
    prompt: list[int],
    rid: str,
    params: SamplingParams,
    wanted: Wanted,
    model: ModelLimits,
    seeds: random.Random,
    session: str,
) -> list[Sequence]:
    stop_ids = frozenset() if params.ignore_eos else model.eos_ids | frozenset(params.stop_token_ids or ())
    limits = Limits(
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        top_k=max(params.top_k, 0),
        stop_ids=stop_ids,
    )
    seed = seeds.getrandbits(64) if params.sampling_seed is None else params.sampling_seed
    # As in SGLang the copies of n > 1 get ids of their own; the request's rid still aborts them all.
    ids = [rid] if params.n == 1 else [uuid.uuid4().hex for _ in range(params.n)]
    return [
        Sequence(rid, id_, prompt, limits, copy_seed(seed, k), wanted, session) for k, id_ in enumerate(ids)
    ]
