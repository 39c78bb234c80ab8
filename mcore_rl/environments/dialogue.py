"""Messages as token ids, where no token that was sampled is rendered again.

A template writes text, and text is no record of what was sampled: encoded again, it gives other tokens, and a
template that writes a tool call in its own way gives another text. So a turn keeps the ids that it had. What
the template writes behind it is found by rendering the conversation twice, up to the turn and with what
followed, and the difference alone is encoded.

A template that writes earlier turns otherwise once a later one is there (it drops thinking, or moves the
system prompt) cannot be continued so: the conversation is encoded anew, and that is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from mcore_rl.data.chat import render
from mcore_rl.data.reader import encode
from mcore_rl.environments.parsers import ServerParsers
from mcore_rl.types import Prompt

ChatMessage = Mapping[str, Any]


class TooLongError(Exception):
    """A text of more tokens than a rollout may have.

    To encode megabytes would keep every other rollout of the event loop for seconds.
    """


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's template, and what it is given for every prompt."""

    tokenizer: PreTrainedTokenizerBase
    tools: Sequence[Any] | None = None
    """JSON schemas of what the assistant may call, where a prompt names none"""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """what else the template is given"""
    response: Mapping[str, Any] | None = None
    """how transformers' parse_response reads an answer (a response template); None: as text alone"""
    parsers: ServerParsers | None = None
    """how the servers read it instead"""

    def tools_of(self, prompt: Prompt) -> Sequence[Any] | None:
        """The tools of a prompt's row, or those of the run."""
        own = prompt.metadata.get("tools")
        return own if own and prompt.messages else self.tools

    def text(self, prompt: Prompt, messages: Sequence[ChatMessage], tools: Any, *, asks: bool) -> str:
        """The conversation as text; with `asks`, up to where the assistant answers. Raises DataError."""
        own = prompt.metadata.get("chat_template_kwargs") or {}
        variables = {**self.variables, **own} if prompt.messages else self.variables
        place = f"the conversation of prompt {prompt.id}"
        return render(place, messages, self.tokenizer, tools=tools, variables=variables, asks=asks)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, as the vocabulary writes it."""
        return max(map(len, self.tokenizer.get_vocab()))

    def check_length(self, text: str, most_tokens: int) -> None:
        """Raises TooLongError for a text that has more tokens in any case, without encoding it."""
        if len(text) > most_tokens * self.longest_token:
            raise TooLongError

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no special token added. Raises DataError."""
        return encode("the text of a turn", text, self.tokenizer)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ids, with the special tokens where `special` says so."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))


@dataclass(frozen=True)
class AskedTurn:
    """A conversation as it is put to the model."""

    messages: Sequence[ChatMessage]
    tools: Any
    text: str
    """as the template writes it"""
    ids: list[int]


@dataclass(frozen=True)
class _Answered:
    """A turn that was sampled: all that came before it, and itself, in the ids that the model saw."""

    asked: AskedTurn
    messages: Sequence[ChatMessage]
    """the assistant's among them"""
    ids: list[int]
    end: str
    """text of the special token that ended it; empty where it was cut"""


class Dialogue:
    """The conversations of one rollout: branches of them, where an environment rewrites what was said."""

    def __init__(self, template: ChatTemplate, prompt: Prompt, most_tokens: int) -> None:
        self._template, self._prompt, self._most_tokens = template, prompt, most_tokens
        self._answered: list[_Answered] = []
        self.rewritten = 0
        """turns that the template could not continue"""

    def ask(self, messages: Sequence[ChatMessage], tools: Any) -> AskedTurn:
        """The ids to sample after.

        Raises:
            DataError: the template fails.
            ValueError: there are no messages.
            TooLongError: they have so much text that it is more than `most_tokens` in any case.
        """
        if not messages:
            raise ValueError("a conversation without a message; give at least one")
        before = self._before(messages, tools)
        if before is None and list(messages) == list(self._prompt.messages) and self._of_prompt(tools):
            return AskedTurn([*messages], tools, self._prompt.text, list(self._prompt.token_ids))
        text = self._text(messages, tools, asks=True)
        self._template.check_length(text, self._most_tokens)
        if before is not None:
            ids = self._continue(before, text)
            if ids is not None:
                return AskedTurn([*messages], tools, text, ids)
            self.rewritten += 1
        return AskedTurn([*messages], tools, text, self._template.encode(text))

    def answer(self, asked: AskedTurn, message: ChatMessage, token_ids: Sequence[int], finish: str) -> None:
        """`message` is what was sampled after `asked`: a conversation that goes on with it keeps its ids."""
        ended = finish == "stop" and bool(token_ids)
        end = self._template.decode(token_ids[-1:], special=True) if ended else ""
        ids = [*asked.ids, *token_ids]
        self._answered.append(_Answered(asked, [*asked.messages, deepcopy(message)], ids, end))

    def _of_prompt(self, tools: Any) -> bool:
        return tools == self._template.tools_of(self._prompt)

    def _text(self, messages: Sequence[ChatMessage], tools: Any, *, asks: bool) -> str:
        return self._template.text(self._prompt, messages, tools, asks=asks)

    def _before(self, messages: Sequence[ChatMessage], tools: Any) -> _Answered | None:
        """The longest and latest conversation that these messages go on from."""
        found = None
        for one in self._answered:
            known = len(one.messages)
            longer = found is None or known >= len(found.messages)
            if longer and list(messages[:known]) == one.messages and one.asked.tools == tools:
                found = one
        return found

    def _continue(self, before: _Answered, text: str) -> list[int] | None:
        """The ids of `text`, which the template writes for what goes on from `before`.

        None where the template wrote what came before in another way than it does now.
        """
        whole = self._text(before.messages, before.asked.tools, asks=False)
        if not (whole.startswith(before.asked.text) and text.startswith(whole)):
            return None
        turn, end = whole[len(before.asked.text) :], before.end
        cut = end or str(self._template.tokenizer.eos_token)
        place = turn.rfind(cut)
        if place < 0:  # it ends a turn with another token than the model did
            return None
        behind = turn[place + len(end) :]
        return [*before.ids, *self._template.encode(behind + text[len(whole) :])]
