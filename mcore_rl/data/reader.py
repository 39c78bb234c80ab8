"""One row of a prompt file to a prompt: which keys are read, and how text and messages become tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from mcore_rl import strict_json
from mcore_rl.data.chat import MAX_CHARACTERS, render
from mcore_rl.data.messages import (
    LastAssistant,
    Message,
    read_messages,
    read_template_kwargs,
    read_tools,
    with_system,
    without_last_answer,
)
from mcore_rl.data.tables import kind
from mcore_rl.errors import DataError
from mcore_rl.lookup import MISSING, look_up, missing
from mcore_rl.terminal import joined, quoted
from mcore_rl.types import Prompt

MOST_OF_ID = 500
"""characters: an id is part of each request's, of which the embedded server takes 1000, and of messages"""
ROW_KEYS = ("system", "tools", "chat_template_kwargs")
"""keys of a row that a chat template is given, where the prompt is a list of messages"""


@dataclass(frozen=True)
class RowFormat:
    """What is read of a row, as [data] says it. A key of the form `a.b.c` looks into objects."""

    prompt_key: str = "prompt"
    label_key: str = "label"
    """empty: rows have no label"""
    id_key: str = "id"
    needs_label: bool = True
    trains_label: bool = False
    """the label is text to be trained on"""
    renders_label: bool = False
    """a label of the assistant's messages is what the chat template writes for them"""
    apply_chat_template: bool = False
    """a string is what a user says in a conversation"""
    last_assistant: LastAssistant = "refuse"
    system: str | None = None
    tools: Sequence[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    choice_key: str = ""
    """key that has one of the `choices` in every row; empty: rows make none"""
    choices: tuple[str, ...] = ()

    @property
    def required_keys(self) -> tuple[str, ...]:
        """Keys that no row may lack."""
        label = (self.label_key,) if self.label_key and self.needs_label else ()
        return (
            self.prompt_key,
            *(label if self.last_assistant != "drop" else ()),
            *(() if self.id_key == "id" else (self.id_key,)),
        )


@dataclass(frozen=True)
class _Chat:
    """What a chat template is given for one row."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None
    variables: Mapping[str, Any]
    answer: str | None
    """of the assistant's turn that was dropped"""


class RowReader:
    """Makes prompts of rows."""

    def __init__(self, form: RowFormat, tokenizer: PreTrainedTokenizerBase) -> None:
        self.form, self.tokenizer = form, tokenizer

    @cached_property
    def begins_with(self) -> tuple[int, ...]:
        """The ids that the tokenizer puts in front of every text, such as <s>."""
        return special_beginning(self.tokenizer)

    def read(self, place: str, record: Mapping[str, Any], name: str, default_id: str) -> Prompt:
        """The prompt of `record`.

        Args:
            name: what its id begins with; empty where it stands alone.
            default_id: its id where the row has none.

        Raises:
            DataError: `place:key: what, remedy`.
        """
        form = self.form
        value = look_up(record, form.prompt_key)
        if value is MISSING:
            raise missing(place, form.prompt_key, record, "add it, or name the key in [data]")
        if "sampling_params" in record:
            raise DataError(
                f"{place}:sampling_params: no prompt is sampled by parameters of its own, since training "
                f"takes "
                "log-probs at one temperature, untruncated; remove it, and set [rollout]"
            )
        prompt_id = self._id(place, record, name, default_id)
        where = f"{place}:{form.prompt_key}"
        chat = self._chat(place, where, value, record)
        text = value if chat is None else self._render(where, chat)
        token_ids = self._begun(encode(where, text, self.tokenizer), special=chat is None)
        if not token_ids or (chat is None and not text):
            raise DataError(f"{where}: empty prompt; give it at least one token")
        label = self._label(place, record, chat, text)
        taken = (form.id_key, form.prompt_key, form.label_key)
        metadata = {key: item for key, item in record.items() if key not in taken}
        metadata |= self._choice(place, record)
        return Prompt(
            prompt_id, text, tuple(token_ids), label, metadata, () if chat is None else chat.messages
        )

    def _choice(self, place: str, record: Mapping[str, Any]) -> dict[str, str]:
        """What the row chooses, by its key; nothing where rows make no choice."""
        key, choices = self.form.choice_key, self.form.choices
        if not key:
            return {}
        value = look_up(record, key)
        if value is MISSING:
            raise missing(place, key, record, f"add it, as one of {joined(choices)}")
        if value not in choices:
            what = quoted(value) if isinstance(value, str) else f"a {kind(value)}"
            raise DataError(f"{place}:{key}: {what}; expected one of {joined(choices)}")
        return {key: value}

    def begins(self, token_ids: Sequence[int]) -> bool:
        """Whether a prompt begins with what the tokenizer would put in front of it."""
        return tuple(token_ids[: len(self.begins_with)]) == self.begins_with

    def _begun(self, token_ids: list[int], *, special: bool) -> list[int]:
        """With the tokenizer's special tokens in front, once; a chat template has put its own there."""
        return token_ids if not special or self.begins(token_ids) else [*self.begins_with, *token_ids]

    def _id(self, place: str, record: Mapping[str, Any], name: str, default: str) -> str:
        where, value = f"{place}:{self.form.id_key}", look_up(record, self.form.id_key)
        if value is MISSING and self.form.id_key != "id":
            raise missing(place, self.form.id_key, record, "add it, or name the key in data.id_key")
        value = default if value is MISSING else value
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise DataError(f"{where}: a {kind(value)}; expected a string or an integer (quote it)")
        if value == "":
            raise DataError(f"{where}: empty; give the row a name, or take the key out")
        if any("\ud800" <= character <= "\udfff" for character in str(value)):
            raise DataError(
                f"{where}: {quoted(value)} holds half of a surrogate pair, which no file can hold; rename it"
            )
        found = f"{name}:{value}" if name else str(value)
        if len(found) > MOST_OF_ID:
            raise DataError(
                f"{where}: {quoted(found)} has {len(found)} characters, and at most {MOST_OF_ID} are read; "
                "shorten it, or name another key in data.id_key"
            )
        return found

    def _chat(self, place: str, where: str, value: Any, record: Mapping[str, Any]) -> _Chat | None:
        """What the chat template is given; None for a prompt that is encoded as it stands."""
        form = self.form
        if isinstance(value, str) and not form.apply_chat_template:
            given = [f"{place}:{key}" for key in ROW_KEYS if record.get(key) not in (None, "", [], {})]
            run = {"data.system": form.system, "data.tools": form.tools}
            run["data.chat_template_kwargs"] = form.chat_template_kwargs
            given += [f"{where}: {key}" for key, its in run.items() if its]
            if _is_text_of_messages(value):
                raise DataError(
                    f"{where}: the JSON text of messages, which would be a prompt as it stands; write the "
                    "list itself"
                )
            if given:
                raise DataError(
                    f"{given[0]}: has no effect on a prompt that is a string; set data.apply_chat_template = "
                    "true, or take it out"
                )
            return None
        if isinstance(value, str):
            if not value:
                raise DataError(f"{where}: empty prompt; give it at least one token")
            value = [{"role": "user", "content": value}]
        messages = read_messages(where, value)
        system = record.get("system")
        if system is not None and not isinstance(system, str):
            raise DataError(f"{place}:system: a {kind(system)}; expected a string (quote it)")
        messages, answer = without_last_answer(
            where, messages, form.last_assistant, trained=form.trains_label
        )
        tools = read_tools(f"{place}:tools", record.get("tools"))
        own = read_template_kwargs(f"{place}:chat_template_kwargs", record.get("chat_template_kwargs"))
        return _Chat(
            with_system(messages, form.system if system is None else system),
            form.tools if tools is None else tools,
            {**form.chat_template_kwargs, **own},
            answer,
        )

    def _render(self, where: str, chat: _Chat, completion: Sequence[Message] = ()) -> str:
        self._needs_template(where)
        messages = [*chat.messages, *completion]
        return render(
            where, messages, self.tokenizer, tools=chat.tools, variables=chat.variables, asks=not completion
        )

    def _needs_template(self, where: str) -> None:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{where}: messages, but the tokenizer has no chat template; give prompts as strings, or put "
                "a chat_template.jinja into the model's directory"
            )

    def _label(self, place: str, record: Mapping[str, Any], chat: _Chat | None, text: str) -> Any:
        form, where = self.form, f"{place}:{self.form.label_key}"
        value = look_up(record, form.label_key) if form.label_key else MISSING
        if value is MISSING and chat is not None and chat.answer is not None:
            value = chat.answer
        if value is MISSING or (value is None and not form.needs_label):
            if form.label_key and form.needs_label:
                remedy = 'add it, or name the key in [data] (data.label_key = "" where no reward reads it)'
                raise missing(place, form.label_key, record, remedy)
            return ""
        if value is None or not _is_json(value):
            raise DataError(
                f"{where}: a {kind(value)}; expected a value of JSON, such as a string (quote it)"
            )
        if form.renders_label and chat is not None and _is_conversation(value):
            return self._completion(where, chat, text, read_messages(where, value))
        if form.trains_label and not isinstance(value, str):
            raise DataError(f"{where}: a {kind(value)}; expected a string (quote it), which is trained on")
        return value

    def _completion(self, where: str, chat: _Chat, prompt: str, completion: Sequence[Message]) -> str:
        """What the template writes for the assistant's messages, less the end of sequence."""
        whole = self._render(where, chat, completion)
        if not whole.startswith(prompt):
            raise DataError(
                f"{where}: with it, the chat template writes the prompt in another way; give the label as a "
                f"string"
            )
        end = str(self.tokenizer.eos_token)
        text = whole[len(prompt) :]
        return text.rstrip().removesuffix(end) if text.rstrip().endswith(end) else text


def encode(place: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `text`, no special token added. Raises DataError."""
    if len(text) > MAX_CHARACTERS:  # of each, a tokenizer takes some hundred bytes
        raise DataError(f"{place}: {len(text)} characters, and at most {MAX_CHARACTERS} are read; shorten it")
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # tokenizers raises bare Exception for text it has no token for
        raise DataError(
            f"{place}: the tokenizer refuses it ({error}); fix the text, or use its model"
        ) from error


def special_beginning(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that a tokenizer adds in front of a text; what it adds behind one is no part of a prompt."""
    ids = tokenizer.encode("", add_special_tokens=True)
    least = int(bool(ids) and ids[0] == tokenizer.bos_token_id)
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    while len(ids) > least and ids[-1] in ends:
        ids = ids[:-1]
    return tuple(ids)


def _is_text_of_messages(text: str) -> bool:
    if not text.lstrip().startswith("["):
        return False
    try:
        found = strict_json.parse(text.encode(errors="surrogatepass"))
    except strict_json.JsonError:
        return False
    return bool(found) and _is_conversation(found)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value)


def _is_json(value: Any) -> bool:
    """Whether a value is one that a file of JSON can hold; of Arrow's, dates and bytes are none."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(map(_is_json, value.values()))
    return value is None or isinstance(value, str | int | bool)
