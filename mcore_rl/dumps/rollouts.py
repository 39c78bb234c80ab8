"""The groups of one step as a file: what was sampled, what it was given, and what people read of it.

A dump holds the arrays of rollout.columns (8 bytes a token, and its experts where routing is replayed), the
prompts whole, the response texts, and the text of every token id that occurs, so that it can be trained or
shown where there is no prompt file and no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_rl import strict_json
from mcore_rl.dumps.archive import Arrays, archive_bytes, malformed, read_archive
from mcore_rl.dumps.check import check_columns, check_groups
from mcore_rl.rollout.columns import Columns, pack_groups, unpack_groups
from mcore_rl.types import Group, Prompt, RewardPart, TurnReward

KIND = "rollouts of mcore_rl, version 1"
Decode = Callable[[Sequence[int] | npt.NDArray[Any]], str]


@dataclass(frozen=True)
class RolloutDump:
    """One step's groups, read back."""

    step: int
    groups: Sequence[Group]
    """with the texts of their samples"""
    temperature: float
    """that the log-probs were taken at"""
    pieces: Mapping[int, str]
    """token id -> its text, of every id that occurs"""
    cursor: Mapping[str, Any]
    """where the prompts stood after this step was asked, as PromptCursor.state has it"""


@dataclass(frozen=True)
class Words:
    """What a tokenizer says of token ids."""

    text: Decode
    """of a response, without special tokens"""
    piece: Callable[[int], str]
    """of one token, special or not"""


def dump_bytes(
    step: int, groups: Sequence[Group], *, temperature: float, cursor: Mapping[str, Any], words: Words
) -> bytes:
    """The file that `read_dump` reads, of scored groups.

    A sample without a text gets that of its trained tokens.
    """
    columns = pack_groups(groups)
    prompts = list({s.prompt.id: s.prompt for group in groups for s in group.samples}.values())
    rows, arrays = _apart(columns)
    prompt_tokens = np.concatenate([np.zeros(0, np.int32), *(p.token_array for p in prompts)])
    ids = _occurring(columns, prompt_tokens)
    arrays |= {
        "prompt_tokens": prompt_tokens,
        "prompt_ends": np.cumsum([len(p.token_ids) for p in prompts], dtype=np.int64),
        "piece_ids": ids,
    }
    document = {
        "kind": KIND,
        "step": step,
        "temperature": temperature,
        "cursor": cursor,
        "columns": rows,
        "texts": [s.text or words.text(s.token_ids) for group in groups for s in group.samples],
        "prompts": [[p.id, p.text, *_values(p)] for p in prompts],
        "pieces": [words.piece(id) for id in ids.tolist()],
    }
    return archive_bytes(document, arrays)


def read_dump(path: Path) -> RolloutDump:
    """The dump of one step.

    Raises:
        DataError: something else wrote the file, or it is damaged, or no policy can have sampled it.
    """
    document, arrays = read_archive(path, KIND)
    try:
        return _dump(document, arrays)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise malformed(path, error) from error


def _dump(document: Mapping[str, Any], arrays: Arrays) -> RolloutDump:
    columns = _together(document["columns"], arrays)
    check_columns(columns)
    prompts = _prompts(document["prompts"], arrays["prompt_tokens"], arrays["prompt_ends"])
    groups = unpack_groups(columns, {prompt.id: prompt for prompt in prompts})
    check_groups(groups)
    step, temperature, cursor = document["step"], document["temperature"], document["cursor"]
    if type(step) is not int or type(temperature) is not float or type(cursor) is not dict:
        raise ValueError("its step, temperature or cursor is none")
    groups = _with_texts(groups, _texts(document["texts"]))
    ids = _occurring(columns, arrays["prompt_tokens"]).tolist()
    if arrays["piece_ids"].tolist() != ids:
        raise ValueError("texts of other tokens")
    pieces = dict(zip(ids, _texts(document["pieces"]), strict=True))
    return RolloutDump(step, groups, temperature, pieces, cursor)


def _values(prompt: Prompt) -> list[str]:
    """What of a prompt is any JSON, as texts; what a file of Arrow can hold besides becomes a string."""
    values = (prompt.label, dict(prompt.metadata), [dict(message) for message in prompt.messages])
    return [json.dumps(value, default=str) for value in values]


def _occurring(columns: Columns, prompt_tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Every token id, once and in order."""
    return np.unique(np.concatenate([columns.tokens, columns.contexts, prompt_tokens]))


def _apart(columns: Columns) -> tuple[dict[str, Any], Arrays]:
    """What of the columns is JSON, and what is arrays."""
    values = {field.name: getattr(columns, field.name) for field in fields(columns)}
    arrays = {name: np.ascontiguousarray(v) for name, v in values.items() if isinstance(v, np.ndarray)}
    return {name: value for name, value in values.items() if name not in arrays}, arrays


def _together(rows: Mapping[str, Any], arrays: Arrays) -> Columns:
    """Raises TypeError, KeyError, ValueError where there are other columns than `pack_groups` makes."""
    likes = _apart(pack_groups([]))[1]
    for name, like in likes.items():
        integers = name == "experts" and np.issubdtype(arrays[name].dtype, np.integer)
        if arrays[name].ndim != like.ndim or (arrays[name].dtype != like.dtype and not integers):
            raise ValueError(f"{name} is {arrays[name].dtype} of {arrays[name].ndim} dimensions")
    columns: dict[str, Any] = {**rows, **{name: arrays[name] for name in likes}}
    columns["samples"] = [_row(row) for row in rows["samples"]]
    return Columns(**columns)


def _row(row: Sequence[Any]) -> Any:
    """What JSON made lists of are the parts and turns of a reward."""
    flat = tuple(row[:5])
    if len(row) == len(flat):
        return flat
    parts, turns = row[5:]
    return *flat, tuple(RewardPart(*part) for part in parts), tuple(TurnReward(*turn) for turn in turns)


def _prompts(rows: Sequence[Any], tokens: npt.NDArray[Any], ends: npt.NDArray[Any]) -> list[Prompt]:
    if tokens.dtype != np.int32 or ends.dtype != np.int64 or tokens.ndim != 1 or len(ends) != len(rows):
        raise ValueError("its prompts have other tokens")
    starts = [0, *ends.tolist()]
    if starts != sorted(starts) or starts[-1] != len(tokens) or (tokens < 0).any():
        raise ValueError("its prompts have other tokens")
    found = []
    for row, (start, end) in zip(rows, pairwise(starts), strict=True):
        id, text, *values = _texts(row)
        label, metadata, messages = (strict_json.parse(value.encode()) for value in values)
        if start == end or not isinstance(metadata, dict):
            raise ValueError("a prompt without tokens, or with other metadata")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError("a prompt with other messages")
        token_ids = tuple(tokens[start:end].tolist())
        found.append(Prompt(id, text, token_ids, label, metadata, tuple(messages)))
    if len({prompt.id for prompt in found}) < len(found):
        raise ValueError("two prompts of one id")
    return found


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("a text is none")
    return values


def _with_texts(groups: Sequence[Group], texts: Sequence[str]) -> list[Group]:
    samples = [sample for group in groups for sample in group.samples]
    told = iter([replace(sample, text=text) for sample, text in zip(samples, texts, strict=True)])
    return [replace(group, samples=tuple(islice(told, len(group.samples)))) for group in groups]
