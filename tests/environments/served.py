"""The embedded server in the test's own process: its engine can be looked at, and no process is started."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from mcore_rl.server.api import Api, build_app
from mcore_rl.server.server import build_api, build_runner


@contextmanager
def embedded(
    model_dir: Path, *, kv_tokens: int = 1 << 16, api_key: str | None = None
) -> Iterator[tuple[str, Api]]:
    """Its address, on an event loop in a thread of its own, and the API that answers there."""
    api = build_api(model_dir, "cpu", 64, None, kv_tokens, 0)
    loop = asyncio.new_event_loop()
    runner = build_runner(build_app(api, api_key=api_key, max_body_bytes=8 << 20))

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(start(), loop).result(30), api
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
