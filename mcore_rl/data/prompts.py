"""Prompt files: reading, checking and encoding them."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mcore_rl import strict_json
from mcore_rl.data.chat import render
from mcore_rl.errors import DataError
from mcore_rl.terminal import escaped, quoted
from mcore_rl.types import Prompt

MOST_DROPPED = 0.9
"""Share of over-long prompts above which a file is refused. Many are a filter at work, which is said and
counted; where next to nothing is left, the limit is in another unit, or tokenizer or key are wrong ones."""
_KEYS_CHARS = 500
"""of a record's keys, as a message quotes them"""


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of one file, in file order."""

    prompts: tuple[Prompt, ...]
    """at least one; ids are unique"""
    too_long: tuple[str, ...]
    """ids of the prompts that were dropped because they exceed the token limit"""
    too_long_at: str = ""
    """`file:line` of the first of them; empty where there are none"""

    @property
    def read(self) -> int:
        """Prompts in the file, the dropped ones included."""
        return len(self.prompts) + len(self.too_long)

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of everything in the prompts that reaches training."""
        return fingerprint(self.prompts)


@dataclass(frozen=True)
class Fingerprint:
    """What tells one set of prompts from another; digests in hex."""

    count: int
    ids: str
    """of the ids in order; all that checkpoints of earlier versions have"""
    content: str
    """of ids, texts, token ids, labels and metadata in order"""
    unordered: str
    """the same in any order"""


def fingerprint(prompts: Sequence[Prompt]) -> Fingerprint:
    """One pass, a few microseconds a prompt: much less than to encode it."""
    ids = hashlib.sha256("\0".join(prompt.id for prompt in prompts).encode(errors="surrogatepass"))
    content, total = hashlib.sha256(), 0
    for prompt in prompts:
        row = _digest(prompt)
        content.update(row)
        total += int.from_bytes(row, "big")  # a sum and no exclusive or: rows that are there twice count
    unordered = hashlib.sha256(total.to_bytes(64, "big"))
    return Fingerprint(len(prompts), *(digest.hexdigest()[:16] for digest in (ids, content, unordered)))


def _digest(prompt: Prompt) -> bytes:
    metadata = json.dumps(prompt.metadata, sort_keys=True, default=str) if prompt.metadata else ""
    texts = [part.encode(errors="surrogatepass") for part in (prompt.id, prompt.text, prompt.label, metadata)]
    parts = [array("q", prompt.token_ids).tobytes(), *texts]
    return hashlib.sha256(b"".join([array("q", map(len, parts)).tobytes(), *parts])).digest()


@dataclass(frozen=True)
class Limit:
    """A length that no sequence, prompt and response together, may exceed."""

    tokens: int
    what: str
    """such as `the model has 512 positions`"""
    remedy: str


@dataclass(frozen=True)
class Response:
    """What follows a prompt in a sequence: at most so many sampled tokens, or its label and an end token."""

    sampled: int | None
    """None: the label itself is trained on"""
    limits: Sequence[Limit] = ()


def load_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_key: str = "prompt",
    label_key: str = "label",
    needs_label: bool = True,
    max_prompt_tokens: int,
    response: Response | None = None,
) -> PromptSet:
    """Read a jsonl file, or a parquet file when the name ends so.

    A prompt is a string, encoded as it stands with no special token added, or a list of messages
    (`{"role": ..., "content": ...}`) that does not end with the assistant's turn, rendered by the tokenizer's
    chat template up to that turn. `id` is optional and defaults to the line number; other keys become the
    prompt's metadata, but for `sampling_params`, which would not act and is refused. A prompt without a
    label, where none is needed, has an empty one. In parquet a null is as good as an absent key, at any
    depth.

    Raises:
        DataError: `file:line:field: what, remedy` for anything malformed, an empty file, a duplicate id, a
            prompt that makes a sequence beyond a limit of `response`, or a file of which more than
            MOST_DROPPED is longer than `max_prompt_tokens`.
    """
    records = list(_parquet(path) if path.suffix == ".parquet" else _jsonl(path))
    if not records:
        raise DataError(f"{path}: no prompts in the file; write one JSON object per line")
    places = dict[str, str]()
    kept, too_long, shortest = list[Prompt](), list[str](), max_prompt_tokens
    for place, record in records:
        prompt = _prompt(place, record, tokenizer, prompt_key, label_key, needs_label=needs_label)
        if prompt.id in places:
            raise DataError(
                f"{place}:id: {quoted(prompt.id)} is already the id at {places[prompt.id]}; ids are unique"
            )
        places[prompt.id] = place
        if len(prompt.token_ids) > max_prompt_tokens:
            too_long.append(prompt.id)
            shortest = min(shortest, len(prompt.token_ids)) if len(too_long) > 1 else len(prompt.token_ids)
            continue
        kept.append(prompt)
        if response is not None:
            _check_length(place, prompt, response, tokenizer, prompt_key, label_key)
    if len(too_long) > MOST_DROPPED * len(records):
        raise DataError(
            f"{path}: {'all' if not kept else f'{len(too_long)} of'} {len(records)} prompts exceed "
            f"{max_prompt_tokens} tokens (the shortest has {shortest}); raise data.max_prompt_tokens, or "
            "take them out of the file"
        )
    return PromptSet(tuple(kept), tuple(too_long), places[too_long[0]] if too_long else "")


def _check_length(
    place: str,
    prompt: Prompt,
    response: Response,
    tokenizer: PreTrainedTokenizerBase,
    prompt_key: str,
    label_key: str,
) -> None:
    """Raises DataError where the prompt and its response do not fit together into a limit."""
    follows, key, what = response.sampled, prompt_key, "rollout.max_new_tokens"
    if follows is None:
        follows = len(_encode(f"{place}:{label_key}", prompt.label, tokenizer)) + 1
        key, what = label_key, "the label and its end of sequence"
    total = len(prompt.token_ids) + follows
    for limit in response.limits:
        if total > limit.tokens:
            raise DataError(
                f"{place}:{key}: prompt {quoted(prompt.id)} of {len(prompt.token_ids)} tokens and {what} of "
                f"{follows} make {total} tokens, and {limit.what}; {limit.remedy}"
            )


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
            record = strict_json.parse(line)
        except strict_json.JsonError as error:
            raise DataError(f"{place}: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{place}: a JSON {_kind(record)}, expected an object per line; write one")
        yield place, record


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(`file:row`, record) of every row, counted from 1."""
    # Imported here: it adds a quarter of a second to the start of every rank, and few runs read parquet.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{path}: {error}; check that it is a readable parquet file") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}:{number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """A value without the keys whose value is null, in objects within it too.

    All rows of a column have the same keys in Arrow, which fills up with nulls what a row lacks: without this
    a template would be shown arguments that nobody gave.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


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
    name = _string(place, "id", record.get("id", place.rpartition(":")[2]))
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise DataError(
            f"{place}:id: {quoted(name)} holds half of a surrogate pair, which no file can hold; rename it"
        )
    text = _text(f"{place}:{prompt_key}", record[prompt_key], tokenizer)
    token_ids = _encode(f"{place}:{prompt_key}", text, tokenizer)
    if not token_ids:
        raise DataError(f"{place}:{prompt_key}: empty prompt; give it at least one token")
    metadata = {key: value for key, value in record.items() if key not in ("id", prompt_key, label_key)}
    return Prompt(name, text, tuple(token_ids), label, metadata)


def _encode(place: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # tokenizers raises bare Exception for text it has no token for
        raise DataError(
            f"{place}: the tokenizer refuses it ({error}); fix the text, or use its model"
        ) from error


def _text(place: str, prompt: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise DataError(f"{place}: a {_kind(prompt)}; expected a string or a list of messages")
    for index, message in enumerate(prompt):
        if not (
            isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        ):
            raise DataError(
                f'{place}[{index}]: expected {{"role": string, "content": string}}; write the message so'
            )
    if not prompt:
        raise DataError(f"{place}: empty list of messages; give at least one")
    if prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{place}[{len(prompt) - 1}]: ends with the assistant's turn, and the response would be one "
            "more; take the turn out, and keep what it says as the label"
        )
    if not tokenizer.chat_template:
        raise DataError(f"{place}: messages, but the tokenizer has no chat template; give prompts as strings")
    return render(place, prompt, tokenizer)


def _string(place: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}:{key}: a {_kind(value)}; expected a string (quote it)")
    return value


def _kind(value: Any) -> str:
    """What a value of JSON or parquet is called."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    names |= {int: "number", float: "number", bytes: "byte string"}
    return names.get(type(value), type(value).__name__)
