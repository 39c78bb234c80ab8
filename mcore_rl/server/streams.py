"""A /generate whose tokens are told as they are sampled: server-sent events, as SGLang 0.5.23 writes them.

Every event holds all that was sampled until then, so that a client that reads slowly is told the newest state
alone, and nothing piles up here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from mcore_rl.errors import McoreRLError
from mcore_rl.server import bodies
from mcore_rl.server.generate import GenerateRequest
from mcore_rl.server.schema import RequestError
from mcore_rl.server.sequence import Sequence
from mcore_rl.server.worker import Worker

Sampled = tuple[list[int], list[float]] | None
"""ids and their log-probs of a sequence that runs; None for one that has ended, which holds them itself"""
Write = Callable[[Sequence, Sampled], dict[str, Any]]
"""the JSON of an event"""


@dataclass
class _Heard:
    """The newest state of every sequence that was told of, and has not been sent yet."""

    loop: asyncio.AbstractEventLoop
    new: dict[Sequence, Sampled] = field(default_factory=dict)
    ended: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, sequence: Sequence, sampled: Sampled) -> None:
        """From the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server ends
            self.loop.call_soon_threadsafe(self._hear, sequence, sampled)

    def end(self, _: object) -> None:
        """Nothing more will be told."""
        self.ended = True
        self.wake.set()

    async def take(self) -> dict[Sequence, Sampled]:
        """What is new; nothing once all has ended."""
        while not (self.new or self.ended):
            self.wake.clear()
            await self.wake.wait()
        new, self.new = self.new, {}
        return new

    def _hear(self, sequence: Sequence, sampled: Sampled) -> None:
        self.new[sequence] = sampled
        self.wake.set()


async def stream_generation(
    request: web.Request, worker: Worker, generation: GenerateRequest, write: Write
) -> web.StreamResponse:
    """Answer with one event for whatever was sampled since the last, and `[DONE]`.

    What fails before the first token is raised, as where nothing is streamed; later it is an event.
    """
    heard = _Heard(asyncio.get_running_loop())
    done = asyncio.wrap_future(worker.generate(generation.sequences, heard.tell))
    done.add_done_callback(heard.end)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    places = {sequence: place for place, sequence in enumerate(generation.sequences)}
    try:
        while new := await heard.take():
            await _send(request, response, [_event(one, new[one], places, generation, write) for one in new])
        if not response.prepared:
            await done
        if error := done.exception():
            await _send(request, response, [_error(error)])
        await _send(request, response, ["[DONE]"])
    except (asyncio.CancelledError, ConnectionError, TimeoutError) as error:
        worker.abort(set(generation.sequences).__contains__)  # the client has gone: do not decode for nobody
        if isinstance(error, asyncio.CancelledError):
            raise
        if request.transport is not None:
            request.transport.abort()
    finally:
        if done.done() and not done.cancelled():
            done.exception()
    return response


def _event(
    sequence: Sequence,
    sampled: Sampled,
    places: dict[Sequence, int],
    generation: GenerateRequest,
    write: Write,
) -> str:
    event = write(sequence, sampled)
    return json.dumps(event | ({"index": places[sequence]} if generation.batch else {}))


def _error(error: BaseException) -> str:
    known = isinstance(error, McoreRLError | RequestError)
    what = {"message": str(error)[:2000] if known else "the server failed; see its log"}
    return json.dumps({"error": what | {"code": 400 if isinstance(error, RequestError) else 500}})


async def _send(request: web.Request, response: web.StreamResponse, events: list[str]) -> None:
    async with asyncio.timeout(bodies.REPLY_SECONDS):
        if not response.prepared:
            await response.prepare(request)
        await response.write("".join(f"data: {event}\n\n" for event in events).encode())
