"""Answers of the gateway: one API's way to ask and to reply, and the stream of a reply that is being sampled.

A stream begins with the first token: what fails before that is answered with a status, as where nothing is
streamed. A client that leaves later has seen tokens, upon which its agent may act: the response is ended at
its server, and what was sampled of it is recorded.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import web

from mcore_rl.environments.gateway.session import ApiError, GatewaySession
from mcore_rl.environments.live import LiveTurn, Said
from mcore_rl.environments.policy import AbortedError, LimitReached, Turn
from mcore_rl.environments.sessions import StateError
from mcore_rl.errors import McoreRLError

_LEAVE_SECONDS = 3.0
"""until a server has said what was sampled of a response that was ended; less than a rollout has to end"""
_WRITE_SECONDS = 60.0
"""for a client to take what it is sent"""


class Events(Protocol):
    """The events of one streamed reply, in the form of its API."""

    named: bool
    """each says its type in a line of its own, and nothing says that it was the last"""

    def begin(self, prompt_tokens: int, /) -> Iterator[Mapping[str, Any]]:
        """Before anything is said."""
        ...

    def say(self, field: str, text: str, /) -> Iterator[Mapping[str, Any]]:
        """More of a field of the message."""
        ...

    def end(self, reply: Mapping[str, Any], rest: Sequence[Said], /) -> Iterator[Mapping[str, Any]]:
        """What was not said of the whole reply."""
        ...

    def fail(self, error: ApiError, /) -> Iterator[Mapping[str, Any]]:
        """It ends before it is whole."""
        ...


@dataclass(frozen=True)
class ApiPath:
    """How one path asks for a turn, and what it makes of it."""

    kind: str
    """its name among the parameters"""
    prefix: str
    """of the ids of its replies"""
    ask: Callable[[GatewaySession, Mapping[str, Any], str, LiveTurn | None], Awaitable[Turn]]
    reply: Callable[[GatewaySession, Mapping[str, Any], str, Turn], dict[str, Any]]
    events: Callable[[GatewaySession, Mapping[str, Any], str], Events]


async def stream_answer(
    request: web.Request, api: ApiPath, session: GatewaySession, body: Mapping[str, Any]
) -> web.StreamResponse:
    """The turn that `body` asks for, as it is sampled. Raises ApiError before the first token."""
    name, live = session.reply_id(api.prefix), LiveTurn()
    events = api.events(session, body, name)
    work = asyncio.create_task(guarded(api.ask(session, body, name, live)))
    work.add_done_callback(lambda _: live.end())
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    began = False
    try:
        said = await live.next()
        if said is None:
            work.result()  # raises what has failed
        began = True
        await response.prepare(request)
        await _send(response, events, events.begin(live.prompt_tokens))
        while said is not None:
            await _send(response, events, (one for each in said for one in events.say(*each)))
            said = await live.next()
        await _send(response, events, _last(api, session, body, name, work, live, events))
        if not events.named:
            await response.write(b"data: [DONE]\n\n")
    except (ConnectionError, TimeoutError):  # it has gone, or does not read
        if request.transport is not None:
            request.transport.abort()
    finally:
        _leave(session, work, live, began=began)
    return response


def _last(
    api: ApiPath,
    session: GatewaySession,
    body: Mapping[str, Any],
    name: str,
    work: asyncio.Task[Turn],
    live: LiveTurn,
    events: Events,
) -> Iterator[Mapping[str, Any]]:
    try:
        turn = work.result()
    except ApiError as error:
        return events.fail(error)
    whole = {**turn.message, "content": turn.text} if api.kind == "completions" else turn.message
    return events.end(api.reply(session, body, name, turn), live.rest(whole))


async def wait_for_left(session: GatewaySession) -> None:
    """Wait for the responses of clients that have left, until what was sampled of them is recorded."""
    if session.requests:
        await asyncio.wait(session.requests, timeout=_LEAVE_SECONDS)
    if session.left:
        await asyncio.wait(session.left, timeout=_LEAVE_SECONDS)


def _leave(session: GatewaySession, work: asyncio.Task[Turn], live: LiveTurn, *, began: bool) -> None:
    """Nobody reads on: a response that has begun is ended and recorded, any other is given up."""
    if work.done():
        if not work.cancelled():
            work.exception()
        return
    if not began:
        work.cancel()
    live.stream.stop()
    session.left.add(work)
    late = asyncio.get_running_loop().call_later(_LEAVE_SECONDS, work.cancel)

    def ended(_: object) -> None:
        late.cancel()
        session.left.discard(work)
        if not work.cancelled():
            work.exception()

    work.add_done_callback(ended)


async def _send(response: web.StreamResponse, of: Events, events: Iterator[Mapping[str, Any]]) -> None:
    lines = (
        f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
        if of.named
        else f"data: {json.dumps(event)}\n\n"
        for event in events
    )
    if text := "".join(lines):
        async with asyncio.timeout(_WRITE_SECONDS):
            await response.write(text.encode())


async def guarded(answer: Awaitable[Turn]) -> Turn:
    """What the policy raises, as an error of the API. Clients ask again for what may be answered then."""
    try:
        return await answer
    except LimitReached as error:
        raise ApiError(400, str(error), code="context_length_exceeded") from None
    except AbortedError as error:
        raise ApiError(503, str(error), kind="api_error") from None
    except StateError as error:
        raise ApiError(500, str(error), kind="api_error") from None
    except McoreRLError as error:
        status = 400 if isinstance(error, ValueError) else 503
        raise ApiError(status, str(error)) from None
    except (TypeError, ValueError, KeyError) as error:  # of a chat template, for what it was given
        raise ApiError(400, f"{type(error).__name__}: {error}") from None
