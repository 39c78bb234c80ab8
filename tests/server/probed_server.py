"""The embedded server with a probe in its event loop, and a way to make its engine thread hang.

`python -m tests.server.probed_server MODEL_DIR --port P`: what `serve` runs, and besides
GET /lag: the longest time since the last call that the loop could not run a timer, in seconds of this
process's CPU time, so that other processes do not count; POST /hang: the engine thread hangs until
POST /let_go.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import torch
from aiohttp import web

from mcore_rl.rollout.processes import Embedded
from mcore_rl.server.api import build_app
from mcore_rl.server.server import build_api, run

TICK = 0.005


class Probed(Embedded):
    """The program of a LocalServer."""

    def command(self, model_dir: Path, port: int, scratch: Path) -> list[str]:
        return [sys.executable, "-m", __name__, str(model_dir), "--port", str(port), *self.options]


class Probe:
    """Holds the longest time between two ticks of the loop."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def watch(self) -> None:
        last = time.process_time()
        while True:
            await asyncio.sleep(TICK)
            now = time.process_time()
            self.worst, last = max(self.worst, now - last), now

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(self.watch())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def lag(self, _: web.Request) -> web.Response:
        worst, self.worst = self.worst, 0.0
        return web.json_response({"seconds": worst})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--port", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    api = build_api(given.model_dir, "cpu", 1024, None, None, 0)
    api.stall_seconds = 1.0
    app, probe = build_app(api, api_key=None, max_body_bytes=8 << 20), Probe()

    let_go = threading.Event()

    async def hang(_: web.Request) -> web.Response:
        let_go.clear()
        api.worker.call(lambda _: let_go.wait())
        return web.Response()

    async def end_hang(_: web.Request) -> web.Response:
        let_go.set()
        return web.Response()

    app.add_routes([web.get("/lag", probe.lag), web.post("/hang", hang), web.post("/let_go", end_hang)])
    app.cleanup_ctx.append(probe.run)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", given.port))
        asyncio.run(run(app, sock))


if __name__ == "__main__":
    main()
