"""One response of /generate, checked against what the model can have sampled.

A server, or what lies between, may be broken, another model's, or hostile. What it says is trained only if
the policy could have said it: every id is a row of the model's vocabulary, there are no more tokens than were
asked for, and every log-prob is one. Anything else is a malformed reply: it is retried, then its server lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_rl.rollout.experts import parse_experts
from mcore_rl.terminal import quoted
from mcore_rl.types import ExpertLayers, VersionSpan

ANY_VOCABULARY = 1 << 31
"""where nobody says which: ids are kept as int32"""
FINISH_REASONS = ("stop", "length", "abort")
"""why a response can have ended"""
LARGEST_LOG_PROB = 1e-4
"""No probability exceeds 1. The logarithm of a float32 softmax may exceed 0 by the rounding of a sum over the
vocabulary, some 1e-6 for 2^18 addends that are summed in a tree, as GPUs and CPUs do. A hundred times that
leaves room for any order of summation, and a ratio that is wrong by 1e-4 harms nobody."""
_FLOAT32 = float(np.finfo(np.float32).max)


class MalformedReplyError(Exception):
    """A reply that no model can have given, or that is not of the wire's form; names the field."""


@dataclass(frozen=True)
class Reply:
    """One checked response of /generate."""

    rid: str
    token_ids: tuple[int, ...]
    """[n] the stop token included when it was sampled"""
    log_probs: tuple[float, ...]
    """[n] log_softmax(logits / temperature), before truncation"""
    prompt_log_probs: tuple[float, ...]
    """[P-1] untempered log-probs of the prompt's second token on; empty unless asked for"""
    finish_reason: str
    """`stop`, `length` or `abort`"""
    versions: tuple[VersionSpan, ...]
    """covering [0, n)"""
    experts: npt.NDArray[np.integer] | None = None
    """[P+n-1, layers, K] of every token but the last, where they were asked for"""


@dataclass(frozen=True)
class Asked:
    """What one response was asked for: what its reply is compared with."""

    rid: str
    """the caller's"""
    sent: str
    """the id of this attempt"""
    prompt: Sequence[int]
    most: int
    """max_new_tokens"""
    vocabulary: int
    """rows of the served model's vocabulary"""
    scored: bool = False
    """whether the prompt's log-probs were asked for"""
    experts: ExpertLayers | None = None
    """experts of the served model, where its choice of them was asked for"""


def parse_reply(item: Any, asked: Asked) -> Reply:
    """The checked reply to what was asked, of the JSON `item`.

    Raises:
        MalformedReplyError: a field is absent, of another type, or says what the model cannot have said.
    """
    try:
        return _parse(item, asked)
    except KeyError as error:
        raise MalformedReplyError(f"request {asked.rid}: reply without the field {error}") from error
    except MalformedReplyError as error:
        raise MalformedReplyError(f"request {asked.rid}: {error}") from error


def check_tokens(
    token_ids: Sequence[Any], log_probs: Sequence[Any], vocabulary: int, most: int | None = None
) -> None:
    """Raises MalformedReplyError for what a model of that vocabulary, asked for `most`, cannot sample."""
    _check_ids(token_ids, vocabulary, "output_ids")
    _check_log_probs(log_probs, "meta_info.output_token_logprobs")
    if len(token_ids) != len(log_probs):
        raise MalformedReplyError(
            f"reply field meta_info.output_token_logprobs: {len(log_probs)} of {len(token_ids)} tokens"
        )
    if most is not None and len(token_ids) > most:
        raise MalformedReplyError(f"reply field output_ids: {len(token_ids)} tokens, {most} were asked for")


def check_spans(spans: Sequence[Any], tokens: int) -> tuple[VersionSpan, ...]:
    """The spans of {version, start, end}, which cover all `tokens` in order. Raises MalformedReplyError."""
    field = "meta_info.weight_versions"
    found = []
    for span in map(_object_of(field), spans):
        version, start, end = span["version"], span["start"], span["end"]
        if type(version) is not str:
            raise _wrong(field, f"version {_shown(version)} is not a string")
        if not type(start) is type(end) is int:
            raise _wrong(field, f"{_shown(start)} to {_shown(end)} are not integers")
        found.append(VersionSpan(version, start, end))
    edges = [0, *(span.end for span in found)]
    covered = [span.start for span in found] == edges[:-1] and edges == sorted(edges)
    if not covered or edges[-1] != tokens:
        raise _wrong(field, f"{_shown(edges)} are not the edges of {tokens} tokens")
    return tuple(found)


def _parse(item: Any, asked: Asked) -> Reply:
    reply = _object(item, "reply")
    meta = _object(reply["meta_info"], "meta_info")
    finish = _object(meta["finish_reason"], "meta_info.finish_reason")["type"]
    if finish not in FINISH_REASONS:
        raise _wrong("meta_info.finish_reason", f"{_shown(finish)}, not one of {FINISH_REASONS}")
    if meta["id"] != asked.sent:
        raise _wrong("meta_info.id", f"{_shown(meta['id'])} is not {asked.sent!r}")
    token_ids = _list(reply["output_ids"], "output_ids")
    aborted_early = finish == "abort" and not token_ids
    entries = meta.get("output_token_logprobs", []) if aborted_early else meta["output_token_logprobs"]
    log_probs, echoed = _scores(entries, "meta_info.output_token_logprobs")
    check_tokens(token_ids, log_probs, asked.vocabulary, asked.most)
    if not token_ids and finish != "abort" and asked.most:  # what stops, by a stop token too, was sampled
        raise _wrong("output_ids", f"no token of a response that ended by {finish!r}")
    _check_ids(echoed, asked.vocabulary, "meta_info.output_token_logprobs")
    if echoed != token_ids:
        raise _wrong("meta_info.output_token_logprobs", "disagrees with output_ids")
    versions = check_spans(_list(meta["weight_versions"], "meta_info.weight_versions"), len(token_ids))
    scored = _prompt_scores(meta, asked) if asked.scored and not aborted_early else ()
    experts = None
    if asked.experts is not None and finish != "abort":
        experts = _routed(meta, asked.experts, len(asked.prompt) + len(token_ids) - 1)
    return Reply(asked.rid, tuple(token_ids), tuple(map(float, log_probs)), scored, finish, versions, experts)


def _prompt_scores(meta: Mapping[str, Any], asked: Asked) -> tuple[float, ...]:
    field = "meta_info.input_token_logprobs"
    scored, ids = _scores(_list(meta["input_token_logprobs"], field)[1:], field)
    _check_log_probs(scored, field)
    _check_ids(ids, asked.vocabulary, field)
    if not _echoes(ids, asked.prompt[1:]):
        raise _wrong(field, "disagrees with the prompt")
    return tuple(map(float, scored))


def _routed(meta: Mapping[str, Any], experts: ExpertLayers, tokens: int) -> npt.NDArray[np.integer]:
    field, encoded = "meta_info.routed_experts", meta.get("routed_experts")
    if not isinstance(encoded, str):
        raise MalformedReplyError(
            f"reply field {field}: absent, and rollout.routing_replay needs it; start the server with "
            "--enable-return-routed-experts"
        )
    try:
        return parse_experts(encoded, experts, tokens)
    except ValueError as error:
        raise MalformedReplyError(f"reply field {field}: {error}") from error


def _scores(entries: Any, field: str) -> tuple[list[Any], list[Any]]:
    """(log-probs, token ids) of [[log-prob, token id, ...], ...], neither checked."""
    found = _list(entries, field)
    if not (set(map(type, found)) <= {list} and min(map(len, found), default=2) >= 2):
        entry = next(entry for entry in found if type(entry) is not list or len(entry) < 2)
        raise _wrong(field, f"{_shown(entry)} is not [log-prob, id, ...]")
    return list(map(itemgetter(0), found)), list(map(itemgetter(1), found))


def _check_ids(ids: Sequence[Any], vocabulary: int, field: str) -> None:
    """Integers in [0, vocabulary): neither `true`, nor 8.0, nor "8"."""
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) < vocabulary)):
        return
    place, wrong = next((i, x) for i, x in enumerate(ids) if type(x) is not int or not 0 <= x < vocabulary)
    what = f"{_shown(wrong)} (token {place}) is no id of the model's {vocabulary}"
    raise MalformedReplyError(f"reply field {field}: {what}")


def _check_log_probs(values: Sequence[Any], field: str) -> None:
    """Numbers that float32 has as finite ones, and that exceed 0 by no more than rounding."""
    if set(map(type, values)) <= {float} and _all_log_probs(np.array(values, np.float64)):
        return  # what a server says; the loop finds what is wrong with anything else
    for place, value in enumerate(values):
        number = type(value) is float or type(value) is int
        if not (number and -_FLOAT32 <= value <= LARGEST_LOG_PROB):  # a NaN compares false
            what = f"{_shown(value)} (token {place}) is not a log-probability, finite and at most 0"
            raise MalformedReplyError(f"reply field {field}: {what}")


def _all_log_probs(values: npt.NDArray[np.float64]) -> bool:
    return bool(((values >= -_FLOAT32) & (values <= LARGEST_LOG_PROB)).all())  # a NaN compares false


def _echoes(ids: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether `ids` are `tokens`, where SGLang echoes the vocabulary's last id as 0 (its log-prob is right).

    SGLang 0.5.23, logprob_result_processor.py: `x if x < vocab_size - 1 else 0`. No other id is as large.
    """
    last = max(tokens, default=0)
    return len(ids) == len(tokens) and all(
        echo == token or (echo == 0 and token == last) for echo, token in zip(ids, tokens, strict=True)
    )


def _object_of(field: str):
    return lambda value: _object(value, field)


def _object(value: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(field, f"{_shown(value)} is not an object")
    return value


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(field, f"{_shown(value)} is not a list")
    return value


def _shown(value: Any) -> str:
    """For a message: short, on one line, whatever it is."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return quoted(value)


def _wrong(field: str, what: str) -> MalformedReplyError:
    return MalformedReplyError(f"reply field {field}: {what}")
