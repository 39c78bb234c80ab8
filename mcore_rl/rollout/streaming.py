"""One response while it is sampled: what a server tells of it, and who listens.

SGLang's events hold all tokens until then, or, with --incremental-streaming-output, the new ones alone: the
count in `meta_info.completion_tokens` tells them apart. Weight versions come with the last event. What is
trained is the whole reply, checked as any other (reply.py); a listener hears its tokens earlier, and nothing
else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from mcore_rl.rollout.reply import Asked, MalformedReplyError, check_tokens

_EVENTS = 64
"""of one response, about: each may hold all tokens until then, and all of them together stay small"""
_DONE = b"[DONE]"
Hear = Callable[[Sequence[int]], None]
"""is told of new tokens, on the loop on which its TokenStream was made"""


class TokenStream:
    """Between whoever asks for a response and who listens to it, on event loops of their own.

    A server that is lost may have told a beginning that the next server, under the same seed, does not
    repeat: the response is then `broken`, and its rest is never told.
    """

    def __init__(self, hear: Hear) -> None:
        self._loop, self._hear = asyncio.get_running_loop(), hear
        self._told: list[int] = []
        self._enough: Future[None] = Future()
        self.broken = False

    @property
    def stopped(self) -> bool:
        """The listener has heard enough."""
        return self._enough.done()

    def stop(self) -> None:
        """From the listener: end the response where it is."""
        if not self._enough.done():
            self._enough.set_result(None)

    async def wait_stopped(self) -> None:
        """On any loop. An attempt that ends stops waiting, which says nothing of the listener."""
        await asyncio.shield(asyncio.wrap_future(self._enough))

    def tell(self, token_ids: Sequence[int]) -> bool:
        """All tokens until now, from whichever attempt; False where they are not those that were told."""
        known = len(self._told)
        new = list(token_ids[known:])
        if self._told[: len(token_ids)] != list(token_ids[:known]):
            self.broken = True
            return False
        if new:
            self._told += new
            self._loop.call_soon_threadsafe(self._hear, new)
        return True


@dataclass
class StreamedReply:
    """The events of one response, joined."""

    asked: Asked
    ids: list[Any] = field(default_factory=list)
    _entries: list[Any] = field(default_factory=list)
    """log-probs with their ids, as the wire has them"""
    _last: Mapping[str, Any] = field(default_factory=dict)

    def add(self, event: Any) -> bool:
        """Returns whether it was the last. Raises MalformedReplyError for what no model can have said."""
        try:
            meta = event["meta_info"]
            new, total, entries = (
                event["output_ids"],
                meta["completion_tokens"],
                meta["output_token_logprobs"],
            )
            if len(new) > total or len(entries) > len(new):  # SGLang's lists may have grown meanwhile
                new, entries = new[:total], entries[:total]
            begin = total - len(new)
            if not 0 <= begin <= len(self.ids) or len(entries) != len(new):
                raise ValueError
        except KeyError:
            if not _ended(event):
                raise MalformedReplyError("an event without ids, their log-probs or their count") from None
            self._last = event  # aborted before it began
            return True
        except (TypeError, ValueError):
            raise MalformedReplyError("an event of which ids, log-probs and count do not agree") from None
        self.ids[begin:], self._entries[begin:] = new, entries
        scores = [entry[0] if type(entry) is list and entry else None for entry in entries]
        check_tokens(new, scores, self.asked.vocabulary, self.asked.most)
        self._last = event
        return _ended(event)

    def whole(self) -> dict[str, Any]:
        """The reply as one that was not streamed has it."""
        meta = {**self._last.get("meta_info", {}), "output_token_logprobs": self._entries}
        return {**self._last, "output_ids": self.ids, "meta_info": meta}


def error_of(event: Any) -> tuple[int, bytes] | None:
    """(HTTP status, what it says) of an event that is an error, or of a response that ended by one."""
    error = event.get("error") if isinstance(event, dict) else None
    if error is None:
        reason = _finish_reason(event)
        if not isinstance(reason, dict) or type(reason.get("status_code")) is not int:
            return None
        error = {"code": reason["status_code"], "message": reason.get("message")}
    code = error.get("code") if isinstance(error, dict) else None
    return code if type(code) is int else 500, json.dumps(error).encode()


def _ended(event: Any) -> bool:
    return _finish_reason(event) is not None


def _finish_reason(event: Any) -> Any:
    meta = event.get("meta_info") if isinstance(event, dict) else None
    return meta.get("finish_reason") if isinstance(meta, dict) else None


def interval(max_new_tokens: int) -> int:
    """Tokens between two events, so that there are few whatever was asked for."""
    return max(1, max_new_tokens // _EVENTS)


async def read_events(chunks: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    """The data of server-sent events until the last. Raises MalformedReplyError where one is too long."""
    held = bytearray()
    async for chunk in chunks:
        held += chunk
        *events, rest = bytes(held).split(b"\n\n")
        held = bytearray(rest)
        if len(held) > most:
            raise MalformedReplyError(f"an event of more than {most} bytes")
        for event in events:
            data = event.removeprefix(b"data:").strip()
            if data == _DONE:
                return
            yield data
