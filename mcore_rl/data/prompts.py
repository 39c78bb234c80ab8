"""Prompt files: reading, checking and encoding them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mcore_rl.errors import DataError
from mcore_rl.terminal import escaped
from mcore_rl.types import Prompt

_KEYS_CHARS = 500
"""of a record's keys, as a message quotes them"""


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of one file, in file order."""

    prompts: tuple[Prompt, ...]
    """at least one; ids are unique"""
    too_long: tuple[str, ...]
    """ids of the prompts that were dropped because they exceed the token limit"""

    @property
    def fingerprint(self) -> str:
        """Digest of the ids in order: a cursor only resumes on the data that it left."""
        return hashlib.sha256("\0".join(prompt.id for prompt in self.prompts).encode()).hexdigest()[:16]


def load_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_key: str = "prompt",
    label_key: str = "label",
    needs_label: bool = True,
    max_prompt_tokens: int,
) -> PromptSet:
    """Read a jsonl file, or a parquet file when the name ends so.

    A prompt is a string, encoded as it stands with no special token added, or a list of messages
    (`{"role": ..., "content": ...}`), rendered by the tokenizer's chat template up to the assistant's turn.
    `id` is optional and defaults to the line number; other keys become the prompt's metadata, but for
    `sampling_params`, which would not act and is refused. A prompt without a label, where none is needed, has
    an empty one.

    Raises:
        DataError: `file:line:field: what, remedy` for anything malformed, an empty file, a duplicate id, or
            when every prompt is longer than `max_prompt_tokens`.
    """
    records = list(_parquet(path) if path.suffix == ".parquet" else _jsonl(path))
    if not records:
        raise DataError(f"{path}: no prompts in the file; write one JSON object per line")
    prompts, seen = [], dict[str, str]()
    for place, record in records:
        prompt = _prompt(place, record, tokenizer, prompt_key, label_key, needs_label=needs_label)
        if prompt.id in seen:
            raise DataError(
                f"{place}:id: {prompt.id!r} is already the id at {seen[prompt.id]}; ids are unique"
            )
        seen[prompt.id] = place
        prompts.append(prompt)
    kept = tuple(prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_tokens)
    if not kept:
        shortest = min(len(prompt.token_ids) for prompt in prompts)
        raise DataError(
            f"{path}: all {len(prompts)} prompts exceed {max_prompt_tokens} tokens (the shortest has "
            f"{shortest}); raise data.max_prompt_tokens"
        )
    too_long = tuple(prompt.id for prompt in prompts if len(prompt.token_ids) > max_prompt_tokens)
    return PromptSet(kept, too_long)


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(`file:line`, object) of every line that is not blank."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the path") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON at column {error.colno}: {error.msg}; fix the line") from None
        except RecursionError:
            raise DataError(f"{place}: nested too deeply; give a flat JSON object") from None
        if not isinstance(record, dict):
            raise DataError(f"{place}: a JSON {_kind(record)}, expected an object per line")
        yield place, record


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(`file:row`, record) of every row, counted from 1."""
    # Imported here: it adds a quarter of a second to the start of every rank, and few runs read parquet.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: {error}; check that it is a readable parquet file") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}:{number}", {key: value for key, value in row.items() if value is not None}


def _prompt(
    place: str,
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    prompt_key: str,
    label_key: str,
    *,
    needs_label: bool,
) -> Prompt:
    for key in (prompt_key, *([label_key] if needs_label else [])):
        if key not in record:
            have = escaped(", ".join(sorted(record)))[:_KEYS_CHARS] or "none"
            raise DataError(f"{place}:{key}: missing (keys here: {have}); add it, or name the key in [data]")
    if "sampling_params" in record:
        raise DataError(
            f"{place}:sampling_params: no prompt is sampled by parameters of its own, since training takes "
            "log-probs at one temperature, untruncated; remove it, and set [rollout]"
        )
    label = _string(place, label_key, record.get(label_key, ""))
    name = record.get("id", place.rpartition(":")[2])
    text = _text(f"{place}:{prompt_key}", record[prompt_key], tokenizer)
    try:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # tokenizers raises bare Exception for text it has no token for
        raise DataError(
            f"{place}:{prompt_key}: the tokenizer refuses it ({error}); fix the text, or use its model"
        ) from error
    if not token_ids:
        raise DataError(f"{place}:{prompt_key}: empty prompt; give it at least one token")
    metadata = {key: value for key, value in record.items() if key not in ("id", prompt_key, label_key)}
    return Prompt(_string(place, "id", name), text, tuple(token_ids), label, metadata)


def _text(place: str, prompt: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise DataError(f"{place}: a {_kind(prompt)}; expected a string or a list of messages")
    for index, message in enumerate(prompt):
        if not (
            isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        ):
            raise DataError(f'{place}[{index}]: expected {{"role": string, "content": string}}')
    if not prompt:
        raise DataError(f"{place}: empty list of messages; give at least one")
    if not tokenizer.chat_template:
        raise DataError(f"{place}: messages, but the tokenizer has no chat template; give prompts as strings")
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


def _string(place: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}:{key}: a {_kind(value)}; expected a string (quote it)")
    return value


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
