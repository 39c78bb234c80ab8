"""Rows that are trained as they are: a prompt with its label, a conversation, a pair of answers, a verdict.

Each becomes an `Example`: the token sequences of which some tokens are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mcore_rl.data.messages import Message, read_messages
from mcore_rl.data.packing import TokenSequence
from mcore_rl.data.reader import MISSING, RowFormat, RowReader, encode, look_up, missing
from mcore_rl.data.tables import kind
from mcore_rl.data.turns import Conversation, encode_turns, said_by_assistant
from mcore_rl.errors import DataError
from mcore_rl.terminal import quoted
from mcore_rl.types import Prompt

Target = Literal["label", "last", "all", "pair", "verdict"]
"""what is trained: the label; the assistant's last turn of a conversation, or all of them; a chosen answer
against a rejected one; an answer that was found desirable or not"""

_LARGEST = float(np.finfo(np.float32).max)
"""a margin beyond it is infinite in the loss"""


@dataclass(frozen=True)
class Example(Prompt):
    """A row that is trained as it is; its `token_ids` are those before the first trained one."""

    sequences: tuple[TokenSequence, ...] = ()
    """one; of a pair the chosen and the rejected one"""
    margin: float = 0.0
    """by how much the chosen answer is better, where the row says it"""
    desirable: bool = True
    """the verdict on the answer, where the row has one"""

    @property
    def tokens(self) -> int:
        """Trained tokens."""
        return sum(sequence.scored for sequence in self.sequences)


@dataclass(frozen=True)
class ExampleFormat(RowFormat):
    """What is read of a row that is trained as it is."""

    target: Target = "label"
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    completion_key: str = "completion"
    margin_key: str = ""
    """empty: rows have no margin"""

    @property
    def required_keys(self) -> tuple[str, ...]:
        """Keys that no row may lack; a prompt may be part of its answers."""
        match self.target:
            case "label":
                return super().required_keys
            case "pair":
                return (self.chosen_key, self.rejected_key)
            case "verdict":
                return (self.completion_key, self.label_key)
            case _:
                return (self.prompt_key,)


class ExampleReader(RowReader):
    """Makes examples of rows."""

    form: ExampleFormat

    def read(self, place: str, record: Mapping[str, Any], name: str, default_id: str) -> Example:
        """The example of `record`; see RowReader.read."""
        if self.form.target == "label":
            return self._labelled(super().read(place, record, name, default_id), place)
        example = self._of_answers(place, record, name, default_id)
        return replace(example, metadata=self._choice(place, record))

    def _of_answers(self, place: str, record: Mapping[str, Any], name: str, default_id: str) -> Example:
        match self.form.target:
            case "pair":
                return self._pair(place, record, self._id(place, record, name, default_id))
            case "verdict":
                return self._verdict(place, record, self._id(place, record, name, default_id))
            case _:
                return self._conversation(place, record, self._id(place, record, name, default_id))

    def _labelled(self, prompt: Prompt, place: str) -> Example:
        answer = self._answer(f"{place}:{self.form.label_key}", prompt.label_text)
        sequence = TokenSequence(prompt.token_ids, answer)
        kept = {name: getattr(prompt, name) for name in Prompt.__dataclass_fields__}
        return Example(**kept, sequences=(sequence,))

    def _answer(self, where: str, text: str) -> list[int]:
        """The ids of an answer, ended by the end-of-sequence token once."""
        end: Any = self.tokenizer.eos_token_id
        ids = encode(where, text, self.tokenizer)
        return ids if ids and ids[-1] == end else [*ids, end]

    def _conversation(self, place: str, record: Mapping[str, Any], name: str) -> Example:
        where = f"{place}:{self.form.prompt_key}"
        value = look_up(record, self.form.prompt_key)
        if not isinstance(value, list):
            if value is MISSING:
                raise missing(
                    place, self.form.prompt_key, record, "add it, or name the key in data.prompt_key"
                )
            raise DataError(
                f'{where}: a {kind(value)}; supervised.target = "{self.form.target}" takes a list of messages'
            )
        chat = self._given(place, where, value, record)
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"{where}: no turn of the assistant, and nothing to train; take the row out")
        chat = chat.up_to(turns[-1] + 1)  # what follows is the context of nothing
        return self._example(where, chat, turns[-1:] if self.form.target == "last" else turns, name, record)

    def _given(
        self, place: str, where: str, messages: Sequence[Any], record: Mapping[str, Any]
    ) -> Conversation:
        chat = self._chat(place, where, list(messages), record)
        assert chat is not None  # only a string is none
        return Conversation(chat.messages, chat.tools, chat.variables)

    def _example(
        self,
        where: str,
        chat: Conversation,
        turns: Sequence[int],
        name: str,
        record: Mapping[str, Any],
    ) -> Example:
        text, sequence = self._sequence(where, chat, turns)
        return self._made(name, text, record, chat.messages, (sequence,))

    def _sequence(self, where: str, chat: Conversation, turns: Sequence[int]) -> tuple[str, TokenSequence]:
        self._needs_template(where)
        text, spans = said_by_assistant(where, chat, turns, self.tokenizer)
        return text, encode_turns(where, text, spans, self.tokenizer)

    def _made(
        self,
        name: str,
        text: str,
        record: Mapping[str, Any],
        messages: Sequence[Message],
        sequences: tuple[TokenSequence, ...],
        **rest: Any,
    ) -> Example:
        """The example of these sequences; the keys of its row are not kept, as nothing reads them."""
        return Example(
            name, text, tuple(sequences[0].prompt), "", {}, tuple(messages), sequences=sequences, **rest
        )

    def _pair(self, place: str, record: Mapping[str, Any], name: str) -> Example:
        form = self.form
        keys = (form.chosen_key, form.rejected_key)
        chosen, rejected = (self._value(place, record, key) for key in keys)
        margin = self._margin(place, record)
        if isinstance(chosen, str) and isinstance(rejected, str):
            text, ids = self._text_prompt(place, record)
            sequences = tuple(
                TokenSequence(ids, self._answer(f"{place}:{key}", answer))
                for key, answer in zip(keys, (chosen, rejected), strict=True)
            )
            return self._made(name, text, record, (), sequences, margin=margin)
        answers = [
            self._conversation_of(place, record, key, value)
            for key, value in zip(keys, (chosen, rejected), strict=True)
        ]
        shared = _shared(answers[0].messages, answers[1].messages)
        both = [
            self._sequence(f"{place}:{key}", chat, self._after(f"{place}:{key}", chat, shared))
            for key, chat in zip(keys, answers, strict=True)
        ]
        sequences = tuple(sequence for _, sequence in both)
        return self._made(name, both[0][0], record, answers[0].messages, sequences, margin=margin)

    def _after(self, where: str, chat: Conversation, shared: int) -> list[int]:
        """The assistant's turns behind what both answers share."""
        turns = [
            i for i, message in enumerate(chat.messages) if message["role"] == "assistant" and i >= shared
        ]
        if not turns or turns[0] != shared or turns[-1] != len(chat.messages) - 1:
            raise DataError(
                f"{where}: behind what both answers share ({shared} messages) it has to begin and end with a "
                "turn of the assistant; write the pair so"
            )
        return turns

    def _verdict(self, place: str, record: Mapping[str, Any], name: str) -> Example:
        key, label = self.form.completion_key, look_up(record, self.form.label_key)
        value = self._value(place, record, key)
        if not isinstance(label, bool):
            what = "missing" if label is MISSING else f"a {kind(label)}"
            raise DataError(
                f"{place}:{self.form.label_key}: {what}; expected true for a desirable answer, else false"
            )
        if isinstance(value, str):
            text, ids = self._text_prompt(place, record)
            sequence = TokenSequence(ids, self._answer(f"{place}:{key}", value))
            return self._made(name, text, record, (), (sequence,), desirable=label)
        chat = self._conversation_of(place, record, key, value)
        shared = len(chat.messages)
        while shared and chat.messages[shared - 1]["role"] != "user":
            shared -= 1
        text, sequence = self._sequence(f"{place}:{key}", chat, self._after(f"{place}:{key}", chat, shared))
        return self._made(name, text, record, chat.messages, (sequence,), desirable=label)

    def _value(self, place: str, record: Mapping[str, Any], key: str) -> Any:
        value = look_up(record, key)
        if value is MISSING:
            raise missing(place, key, record, "add it, or name the key in [data]")
        if not isinstance(value, str | list) or not value:
            raise DataError(f"{place}:{key}: {_what(value)}; expected a string or a list of messages")
        return value

    def _text_prompt(self, place: str, record: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
        """Text and ids of the prompt of answers that are text."""
        where = f"{place}:{self.form.prompt_key}"
        value = self._value(place, record, self.form.prompt_key)
        chat = self._chat(place, where, value, record)
        text = value if chat is None else self._render(where, chat)
        ids = self._begun(encode(where, text, self.tokenizer), special=chat is None)
        if not ids:
            raise DataError(f"{where}: empty prompt; give it at least one token")
        return text, tuple(ids)

    def _conversation_of(self, place: str, record: Mapping[str, Any], key: str, value: Any) -> Conversation:
        """An answer with what it answers: its own messages, behind the prompt's if the assistant begins."""
        where = f"{place}:{key}"
        if isinstance(value, str):
            value = [{"role": "assistant", "content": value}]
        messages = read_messages(where, value)
        if messages[0]["role"] == "assistant":
            asked = self._value(place, record, self.form.prompt_key)
            before = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            messages = [*read_messages(f"{place}:{self.form.prompt_key}", before), *messages]
        return self._given(place, where, messages, record)

    def _margin(self, place: str, record: Mapping[str, Any]) -> float:
        key = self.form.margin_key
        if not key:
            return 0.0
        value = look_up(record, key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"{place}:{key}: {_what(value)}; expected a finite number")
        if not -_LARGEST <= value <= _LARGEST:  # NaN compares false, and int(10**400) is no float
            raise DataError(f"{place}:{key}: beyond float32; expected a finite number")
        return float(value)


def _what(value: Any) -> str:
    if value is MISSING:
        return "missing"
    return f"an empty {kind(value)}" if isinstance(value, str | list) and not value else f"a {kind(value)}"


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Messages that two conversations begin with alike, less the assistant's at the end of them."""
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    while count and not _both_answer(chosen, rejected, count):
        count -= 1
    return count


def _both_answer(chosen: Sequence[Message], rejected: Sequence[Message], at: int) -> bool:
    return all(at < len(one) and one[at]["role"] == "assistant" for one in (chosen, rejected))


@dataclass(frozen=True)
class Limit:
    """A length that no sequence may exceed."""

    tokens: int
    what: str
    """such as `the model has 512 positions`"""
    remedy: str
    align: int = 1
    """a sequence is padded to a multiple of it"""
    together: bool = False
    """both answers of a pair count, with their prompts and their padding"""
    behind: int = 0
    """tokens that every sequence needs room for besides"""


_FOLLOWS: Mapping[Target, tuple[str, ...]] = {
    "label": ("the label and its end of sequence",),
    "last": ("the rest of its conversation",),
    "all": ("the rest of its conversation",),
    "pair": ("its chosen answer", "its rejected answer"),
    "verdict": ("its completion",),
}


def check_example(place: str, example: Example, limits: Sequence[Limit], form: ExampleFormat) -> None:
    """Raises DataError where an example exceeds a limit."""
    keys = {"label": (form.label_key,), "pair": (form.chosen_key, form.rejected_key)}
    keys["verdict"] = (form.completion_key,)
    for limit in limits:
        whole = [len(sequence) + limit.behind for sequence in example.sequences]
        lengths = [-(-tokens // limit.align) * limit.align for tokens in whole]
        if limit.together and len(lengths) > 1 and sum(lengths) > limit.tokens:
            raise DataError(
                f"{place}: both answers of {quoted(example.id)} make {sum(lengths)} tokens with their "
                f"prompts and padding, and {limit.what}; {limit.remedy}"
            )
        for i, (sequence, length) in enumerate(zip(example.sequences, lengths, strict=True)):
            if length > limit.tokens:
                key = keys.get(form.target, (form.prompt_key,))[i]
                raise DataError(
                    f"{place}:{key}: prompt {quoted(example.id)} of {len(sequence.prompt)} tokens and "
                    f"{_FOLLOWS[form.target][i]} of {len(sequence.response)} make {len(sequence)} tokens, "
                    f"and {limit.what}; {limit.remedy}"
                )
