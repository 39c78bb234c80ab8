"""An answer while it is sampled: what of its message can be shown before it is complete.

Text is shown as it comes, of an answer that transformers' parser reads as soon as that has made up its mind.
Calls, and all that a server's parser reads, come with the whole answer. What was shown cannot be taken back:
where the whole answer reads otherwise, as one with a call that cannot be parsed, its rest stays unsaid.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from transformers.utils.chat_parsing.response_parser import ResponseParser
from transformers.utils.chat_parsing.response_templates import load_response_template

from mcore_rl.environments.dialogue import AskedTurn, ChatTemplate
from mcore_rl.rollout.streaming import TokenStream

_UNDECIDED = "\ufffd"
"""at the end of a text: the first bytes of a character, of which the next token has more"""
_MOST_HELD = 8
"""tokens without a whole character, after which they are shown as they are"""
Said = tuple[str, str]
"""a field of the message, and what is new of it"""


class LiveTurn:
    """Made and heard on one event loop; `stream` is for the request."""

    def __init__(self) -> None:
        self._new: asyncio.Queue[Sequence[int] | None] = asyncio.Queue()
        self.stream = TokenStream(self._new.put_nowait)
        self.prompt_tokens = 0
        """known before anything is heard"""
        self.shown: dict[str, str] = {}
        self._read: _Text | _Parsed | None = None

    def begin(self, template: ChatTemplate, asked: AskedTurn | None, prompt_tokens: int) -> None:
        """The answer is asked for."""
        self.prompt_tokens = prompt_tokens
        if asked is not None and template.response is not None and template.parsers is None:
            self._read = _Parsed(template, asked)
        elif asked is None or template.parsers is None:
            self._read = _Text(template)

    def end(self) -> None:
        """Nothing more will come."""
        self._new.put_nowait(None)

    async def next(self) -> list[Said] | None:
        """What can be shown of the next tokens, which may be nothing; None at the end."""
        ids = await self._new.get()
        if ids is None:
            return None
        said = [] if self._read is None else list(self._read.feed(ids))
        said = [(name, text) for name, text in said if text]
        for name, text in said:
            self.shown[name] = self.shown.get(name, "") + text
        return said

    def rest(self, message: Mapping[str, object]) -> list[Said]:
        """What is still to be shown of the texts of the whole message."""
        texts = {name: text for name, text in message.items() if isinstance(text, str) and name != "role"}
        shown = {name: self.shown.get(name, "") for name in texts}
        return [
            (name, text[len(shown[name]) :])
            for name, text in texts.items()
            if len(text) > len(shown[name]) and text.startswith(shown[name])
        ]

    def given(self, message: Mapping[str, object]) -> str:
        """The content that a client has at the end."""
        return self.shown.get("content", "") + dict(self.rest(message)).get("content", "")


class _TokenText:
    """Ids to text, token by token: each is decoded with what came before it, as its text may depend on it."""

    def __init__(self, template: ChatTemplate, *, special: bool) -> None:
        self._template, self._special = template, special
        self._ids: list[int] = []
        self._from = self._until = 0

    def feed(self, ids: Sequence[int]) -> str:
        self._ids += ids
        before = self._decode(self._ids[self._from : self._until])
        now = self._decode(self._ids[self._from :])
        if now.endswith(_UNDECIDED) and len(self._ids) - self._until < _MOST_HELD:
            return ""
        self._from, self._until = self._until, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._template.decode(ids, special=self._special)


class _Text:
    """An answer that is text alone."""

    def __init__(self, template: ChatTemplate) -> None:
        self._decoder = _TokenText(template, special=False)

    def feed(self, ids: Sequence[int]) -> Iterator[Said]:
        yield "content", self._decoder.feed(ids)


class _Parsed:
    """An answer as a response template reads it: the first region of every field that is plain text."""

    def __init__(self, template: ChatTemplate, asked: AskedTurn) -> None:
        self._decoder = _TokenText(template, special=True)
        response = load_response_template(dict(template.response or {}))
        self._strips = {
            name: bool(one.content_args.get("strip", True))
            for name, one in response.fields.items()
            if one.content == "text" and one.transform is None and not one.repeats
        }
        self._parser: ResponseParser | None = ResponseParser(response, prefix=asked.text)
        self._held: dict[str, str] = {}
        """white space at the end of what was said, which may be stripped"""
        self._closed: set[str] = set()
        self._early = self._parser.initial_events

    def feed(self, ids: Sequence[int]) -> Iterator[Said]:
        if self._parser is None:
            return
        try:
            events = [*self._early, *self._parser.feed(self._decoder.feed(ids))]
        except Exception:  # of transformers, for what a model wrote: the whole answer says why
            self._parser = None
            return
        self._early = []
        for event in events:
            name = event["field"]
            if event["type"] == "region_close":
                self._closed.add(name)
            elif event["type"] == "region_chunk" and name in self._strips and name not in self._closed:
                yield name, self._settled(name, event["text"])

    def _settled(self, name: str, text: str) -> str:
        if not self._strips[name]:
            return text
        if name not in self._held:
            text = text.lstrip()
            if not text:
                return ""
        whole = self._held.get(name, "") + text
        said = whole.rstrip()
        self._held[name] = whole[len(said) :]
        return said
