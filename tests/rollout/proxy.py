"""A proxy that fails as its script says, in front of a real server: there is no fake server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

Fault = Callable[[web.Request, bytes], Any]
"""(request, the server's own reply) -> what is sent instead, or an awaitable of it"""


def status(code: int, **headers: str) -> Fault:
    """Answers `code`."""
    return lambda request, raw: web.Response(
        status=code, text="scripted", headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


def body(change: Callable[[bytes], bytes]) -> Fault:
    """The server's reply, changed, as a complete 200."""
    return lambda request, raw: web.Response(body=change(raw), content_type="application/json")


def damaged(change: Callable[[dict[str, Any]], object]) -> Fault:
    """The server's reply with its first response changed in place."""

    def rewrite(raw: bytes) -> bytes:
        data = json.loads(raw)
        change(data[0])
        return json.dumps(data).encode()

    return body(rewrite)


def cut(share: float) -> Fault:
    """The connection breaks after a share of the reply's bytes."""

    async def send(request: web.Request, raw: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(raw))})
        await response.prepare(request)
        await response.write(raw[: int(share * len(raw))])
        if request.transport is not None:
            request.transport.abort()
        return response

    return send


def hang(seconds: float) -> Fault:
    """No answer for `seconds`."""

    async def wait(request: web.Request, raw: bytes) -> web.Response:
        await asyncio.sleep(seconds)
        return web.Response(body=raw, content_type="application/json")

    return wait


@dataclass
class Proxy:
    """`calls` are (path, JSON body) in order; the next call of `path` meets the next fault of the script."""

    url: str
    script: list[Fault]
    path: str = "/generate"
    on_arrival: Callable[[], None] = lambda: None
    """happens when `path` is called, before the server sees it"""
    calls: list[tuple[str, Any]] = field(default_factory=list)

    def bodies(self, path: str) -> list[Any]:
        return [sent for name, sent in self.calls if name == path]


@asynccontextmanager
async def proxy(target: str, *script: Fault, **options: Any) -> AsyncIterator[Proxy]:
    """Forwards everything to `target`; ends with the block. `options` are other fields of Proxy."""
    state = Proxy("", list(script), **options)

    async def forward(request: web.Request) -> web.StreamResponse:
        sent = await request.read()
        state.calls.append((request.path, json.loads(sent) if sent else None))
        if request.path == state.path:
            state.on_arrival()
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.request(
                    request.method, target + request.path_qs, data=sent, headers=request.headers
                ) as reply,
            ):
                raw = await reply.read()
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=str(error))
        if request.path == state.path and state.script:
            answer = state.script.pop(0)(request, raw)
            return await answer if asyncio.iscoroutine(answer) else answer
        return web.Response(body=raw, status=reply.status, content_type=reply.content_type)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        state.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield state
    finally:
        await runner.cleanup()


@contextmanager
def proxy_beside(target: str, *script: Fault, **options: Any) -> Iterator[Proxy]:
    """A `proxy` in a thread with a loop of its own, for callers that are not asynchronous."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    context = proxy(target, *script, **options)
    try:
        yield asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(30)
    finally:
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
