"""What of a conversation the assistant said: found by the chat template, exactly or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mcore_rl.data.chat import render, render_marked
from mcore_rl.data.messages import Message
from mcore_rl.data.packing import TokenSequence
from mcore_rl.data.reader import encode
from mcore_rl.errors import DataError

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY = (
    "mark what the assistant says with {% generation %} and {% endgeneration %} in the template, or train on "
    'the last turn alone (supervised.target = "last")'
)


@dataclass(frozen=True)
class Conversation:
    """Messages, and what the chat template is given beside them."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None
    variables: Mapping[str, Any]

    def up_to(self, count: int) -> Conversation:
        """Its first `count` messages."""
        return Conversation(self.messages[:count], self.tools, self.variables)


def said_by_assistant(
    place: str, chat: Conversation, turns: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the [start, end) characters of some of the assistant's turns.

    A template that marks its generations is believed. Of any other, the text before a turn (that with which a
    server would be asked for it) and the text up to its end must be prefixes of the whole text.

    Args:
        turns: numbers of the messages, ascending, each of the role `assistant`.

    Raises:
        DataError: `place: what, remedy`: the template writes a turn in another way where others follow, or
            marks other turns than those there are.
    """
    if _MARKER.search(tokenizer.get_chat_template(tools=None if chat.tools is None else list(chat.tools))):
        return _marked(place, chat, turns, tokenizer)
    whole = _text(place, chat, tokenizer)
    return whole, [_prefixes(place, chat, turn, whole, tokenizer) for turn in turns]


def _marked(
    place: str, chat: Conversation, turns: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    text, spans = render_marked(place, chat.messages, tokenizer, tools=chat.tools, variables=chat.variables)
    said = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if len(spans) != len(said) or any(start >= end for start, end in spans):
        raise DataError(
            f"{place}: the chat template marks {len(spans)} generations in a conversation with {len(said)} "
            "turns of the assistant; put {% generation %} around the whole of each turn, its end token "
            "included"
        )
    return text, [spans[said.index(turn)] for turn in turns]


def _prefixes(
    place: str, chat: Conversation, turn: int, whole: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    if turn == 0 or chat.messages[turn - 1]["role"] == "assistant":
        raise DataError(
            f"{place}[{turn}]: a turn of the assistant that nothing asks for; take it out, or join it with "
            "the one before"
        )
    before = _text(place, chat.up_to(turn), tokenizer, asks=True)
    through = _text(place, chat.up_to(turn + 1), tokenizer)
    if not (through.startswith(before) and whole.startswith(through)):
        raise DataError(
            f"{place}[{turn}]: the chat template writes this turn otherwise where the conversation goes on "
            f"(or than it is asked for), so that what is trained is not what is sampled; {_REMEDY}"
        )
    return len(before), _end_of_turn(through, tokenizer)


def _text(place: str, chat: Conversation, tokenizer: PreTrainedTokenizerBase, *, asks: bool = False) -> str:
    return render(place, chat.messages, tokenizer, tools=chat.tools, variables=chat.variables, asks=asks)


def _end_of_turn(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where a turn ends: behind its end token, after which nobody samples what a template writes yet."""
    stripped = text.rstrip()
    ends = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return len(stripped) if stripped.endswith(tuple(ends | {str(tokenizer.eos_token)})) else len(text)


def encode_turns(
    place: str, text: str, spans: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> TokenSequence:
    """The tokens of a conversation up to the end of its last span, those of the `spans` trained.

    Each span is encoded by itself, as a server's prompt and its response are: no token lies across its
    border.

    Args:
        spans: [start, end) characters of `text`, ascending; one at least.

    Raises:
        DataError: the tokenizer refuses the text or writes it otherwise piece by piece, or nothing precedes
            what is trained.
    """
    bounds = [0, *(bound for span in spans for bound in span)]
    pieces = [encode(place, text[a:b], tokenizer) for a, b in pairwise(bounds)]
    if not pieces[0]:
        raise DataError(f"{place}: nothing precedes what is trained; begin with a turn that asks for it")
    ids = [token for piece in pieces for token in piece]
    whole = encode(place, text[: bounds[-1]], tokenizer)
    if ids != whole and _decoded(ids, tokenizer) != _decoded(whole, tokenizer):
        raise DataError(
            f"{place}: the tokenizer writes other text when it encodes a turn by itself (such as a space in "
            "front), so that what is trained is not what is sampled; use a template whose turns begin "
            "behind a special token"
        )
    trained = np.repeat([i % 2 == 0 for i in range(len(pieces) - 1)], [len(p) for p in pieces[1:]])
    response = ids[len(pieces[0]) :]
    if not trained.any():
        raise DataError(f"{place}: what is trained has no token; take the row out")
    return TokenSequence(pieces[0], response, None if trained.all() else trained)


def _decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
