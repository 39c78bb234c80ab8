"""The HTTP API: the part of SGLang 0.5.23's native API that reinforcement learning needs, over one Worker.

Errors keep SGLang's three forms: {"object": "error", ...} for a malformed body, {"error": {"message"}} for
values that cannot be served, {"success": false, "message"} for weight updates. What this server lacks is
refused with 400.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import random
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from aiohttp import web
from pydantic import BaseModel, ValidationError
from transformers import PreTrainedTokenizerBase

from mcore_rl.errors import CheckpointError, NumericsError
from mcore_rl.server import bodies, schema
from mcore_rl.server.bodies import MalformedBodyError, encode, read_json
from mcore_rl.server.engine import Engine
from mcore_rl.server.generate import ModelLimits, parse_generate
from mcore_rl.server.replies import generate_reply, streamed_reply
from mcore_rl.server.schema import RequestError, reasons
from mcore_rl.server.sequence import Sequence
from mcore_rl.server.streams import Sampled, stream_generation
from mcore_rl.server.weights import Shapes, combined_checksum, replace_weights, weight_checksums
from mcore_rl.server.worker import Worker

VERSION = "0.5.23+mcore_rl-embedded"
"""The API level it speaks, and that it is not SGLang."""

_SHUTDOWN_SECONDS = 2.0
_MESSAGE_CHARS = 2000
"""characters of an error: a reply never grows with what was asked"""
_OPEN_PATHS = frozenset({"/health", "/ready"})
_UNSUPPORTED = (
    *("/update_weights_from_tensor", "/update_weights_from_distributed", "/update_weights_from_ipc"),
    *("/init_weights_update_group", "/destroy_weights_update_group", "/get_weights_by_name"),
    *("/release_memory_occupation", "/resume_memory_occupation"),
)

B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Api:
    """Handlers over one engine; `routes` lists them."""

    worker: Worker
    limits: ModelLimits
    tokenizer: PreTrainedTokenizerBase | None
    shapes: Shapes
    """Tensor names and shapes that a weight update must have."""
    info: Mapping[str, Any]
    """Fixed fields of /server_info and /model_info, under SGLang's names."""
    seeds: random.Random
    """For requests without a seed of their own."""
    updating: bool = False
    """Between /begin_weight_update and /end_weight_update."""
    stall_seconds: float = 20.0
    """/health is 503 after so long without progress at one piece of work."""
    bodies: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "mcore_rl-bodies"))
    """Parses what is asked and writes what is replied, beside the event loop."""

    def close(self, timeout: float) -> None:
        """Ends its threads after what they are at."""
        self.worker.close(timeout)
        self.bodies.shutdown(wait=False, cancel_futures=True)

    def routes(self) -> list[web.RouteDef]:
        posts: dict[str, Handler] = {
            "/generate": self.generate,
            "/pause_generation": self.pause,
            "/continue_generation": self.resume,
            "/abort_request": self.abort,
            "/begin_weight_update": self.begin_update,
            "/end_weight_update": self.end_update,
            "/update_weights_from_disk": self.update_from_disk,
            "/update_weight_version": self.update_version,
            "/weights_checker": self.check_weights,
            "/flush_cache": self.flush,
        }
        gets: dict[str, Handler] = {
            "/ready": self.ready,
            "/health": self.health,
            "/model_info": self.model_info,
            "/server_info": self.server_info,
            "/v1/loads": self.loads,
            "/flush_cache": self.flush,
        }
        return [
            *(web.post(path, handler) for path, handler in posts.items()),
            *(web.get(path, handler) for path, handler in gets.items()),
            *(web.route("*", path, _unsupported) for path in _UNSUPPORTED),
        ]

    # -- generation ---------------------------------------------------------------------------------------

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request, self.bodies)
        generation = await self._aside(parse_generate, body, self.limits, self.tokenizer, self.seeds)
        if generation.stream:
            return await stream_generation(request, self.worker, generation, self._write_event)
        mine = set(generation.sequences)
        try:
            finished = await asyncio.wrap_future(self.worker.generate(generation.sequences))
        except asyncio.CancelledError:  # the client has gone: do not decode for nobody
            self.worker.abort(mine.__contains__)
            raise
        return await self._aside(self._write, finished, generation.batch)

    def _write(self, finished: list[Sequence], batch: bool) -> web.Response:
        replies = [generate_reply(sequence, self.tokenizer) for sequence in finished]
        text = encode(replies if batch else replies[0])
        return web.Response(body=text.encode(), content_type="application/json")

    def _write_event(self, sequence: Sequence, sampled: Sampled) -> dict[str, Any]:
        if sampled is None:
            return generate_reply(sequence, self.tokenizer)
        return streamed_reply(sequence, sampled, self.tokenizer)

    async def pause(self, request: web.Request) -> web.Response:
        body = await self._parse(request, schema.PauseBody)
        await asyncio.wrap_future(self.worker.pause(body.mode))
        return _reply({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, request: web.Request) -> web.Response:
        await self._parse(request, schema.ContinueBody)
        await self._call(Engine.resume)
        return _reply({"message": "Generation continued successfully.", "status": "ok"})

    async def abort(self, request: web.Request) -> web.Response:
        body = await self._parse(request, schema.AbortBody)
        await asyncio.wrap_future(self.worker.abort(lambda s: body.abort_all or s.rid == body.rid))
        return web.Response()

    async def flush(self, request: web.Request) -> web.Response:
        busy = await self._call(lambda engine: len(engine.running) + len(engine.waiting))
        if busy:
            return web.Response(
                status=400, text=f"Cache not flushed: {busy} requests are running or waiting.\n"
            )
        await self._call(Engine.forget_prefixes)
        return web.Response(text="Cache flushed.\n")

    # -- weights ------------------------------------------------------------------------------------------

    async def begin_update(self, request: web.Request) -> web.Response:
        await self._parse(request, schema.BeginUpdateBody)
        if self.updating:
            return _update(False, "a weight-update session is already open; call end_weight_update() first")
        self.updating = True
        return _update(True, "Success")

    async def end_update(self, request: web.Request) -> web.Response:
        await self._parse(request, schema.EmptyBody)
        if not self.updating:
            return _update(False, "no weight-update session is open; call begin_weight_update() first")
        self.updating = False
        return _update(True, "Success")

    async def update_from_disk(self, request: web.Request) -> web.Response:
        """All or nothing: after a 400 the old weights and the old version still serve."""
        body = await self._parse(request, schema.UpdateFromDiskBody)
        if body.abort_all_requests:
            await asyncio.wrap_future(self.worker.abort(lambda _: True))
        try:
            paused = await self._call(lambda engine: _replace(engine, body, self.shapes), quiet=True)
        except CheckpointError as error:
            return _update(False, str(error), num_paused_requests=0)
        version = (
            f" Weight version updated to {body.weight_version}." if body.weight_version is not None else ""
        )
        return _update(True, f"Succeeded to update model weights.{version}", num_paused_requests=paused)

    async def update_version(self, request: web.Request) -> web.Response:
        body = await self._parse(request, schema.UpdateVersionBody)
        if body.abort_all_requests:
            await asyncio.wrap_future(self.worker.abort(lambda _: True))
        await self._call(lambda engine: engine.set_version(body.new_version))
        return _update(True, f"Weight version updated to {body.new_version}", new_version=body.new_version)

    async def check_weights(self, request: web.Request) -> web.Response:
        await self._parse(request, schema.CheckerBody)
        checksums = await self._call(lambda engine: weight_checksums(engine.model))
        combined = combined_checksum(checksums)
        ranks = {
            "tp_rank": 0,
            "tp_size": 1,
            "dp_rank": 0,
            "dp_size": 1,
            "pp_rank": 0,
            "pp_size": 1,
            "rank": 0,
            "size": 1,
        }
        rank = {
            "checksums": checksums,
            "per_gpu_checksum": combined,
            "parallelism_info": [{"role": "target"} | ranks],
        }
        return _update(True, "Success.", ranks=[rank], per_engine_checksum=combined)

    # -- state: nothing here waits for the engine thread, whose step may outlast a client -----------------

    async def ready(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.worker.engine.paused else 200)

    async def health(self, request: web.Request) -> web.Response:
        """200 when the engine thread waits for work or gets on with it, else 503."""
        return web.Response(status=503 if self.worker.stalled > self.stall_seconds else 200)

    async def model_info(self, request: web.Request) -> web.Response:
        names = (
            "model_path",
            "served_model_name",
            "tokenizer_path",
            "model_type",
            "architectures",
            "load_format",
        )
        version = self.worker.state.version
        fixed = {"is_generation": True, "has_image_understanding": False, "has_audio_understanding": False}
        return _reply({name: self.info[name] for name in names} | fixed | {"weight_version": version})

    async def server_info(self, request: web.Request) -> web.Response:
        version = self.worker.state.version
        return _reply(dict(self.info) | {"version": VERSION, "weight_version": version})

    async def loads(self, request: web.Request) -> web.Response:
        state, capacity = self.worker.state, self.worker.engine.cache.capacity
        load = {
            "timestamp": time.time(),
            "dp_rank": 0,
            "num_running_reqs": state.running,
            "num_waiting_reqs": state.waiting,
            "num_used_tokens": state.used_tokens,
            "max_total_num_tokens": capacity,
            "max_running_requests": self.info["max_running_requests"],
            "token_usage": state.used_tokens / capacity,
        }
        return _reply({"timestamp": datetime.now(UTC).isoformat(), "version": VERSION, "loads": [load]})

    def _call(self, run: Callable[[Engine], Any], *, quiet: bool = False) -> asyncio.Future[Any]:
        return asyncio.wrap_future(self.worker.call(run, quiet=quiet))

    def _aside(self, run: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self.bodies, run, *args)

    async def _parse(self, request: web.Request, model: type[B]) -> B:
        body = await read_json(request, self.bodies)
        schema.check_names(body, model)
        return model.model_validate(body)


def build_app(
    api: Api, *, api_key: str | None, max_body_bytes: int, hosts: Collection[str] = ()
) -> web.Application:
    """With an `api_key` every path but /health and /ready needs `Authorization: Bearer <key>`.

    Whatever may act needs a body that is declared as JSON: a page in a browser on this machine can send other
    types to any address without being asked. Where there are `hosts`, a request must name one of them, or an
    address of loopback, as its host: the site of such a page may give its own name this machine's address.
    """
    middlewares = [until_sent, _named(hosts), _auth(api_key), _errors, _json_only]
    app = web.Application(middlewares=middlewares, client_max_size=max_body_bytes)
    app.add_routes(api.routes())
    # What is in flight at the end is dropped, so that its clients turn to another server at once.
    app.on_shutdown.append(lambda _: asyncio.to_thread(api.close, _SHUTDOWN_SECONDS))
    return app


def _replace(engine: Engine, body: schema.UpdateFromDiskBody, shapes: Shapes) -> int:
    """On the engine thread: new weights and their version in one go; returns how many requests are paused."""
    if body.flush_cache and engine.running:
        raise CheckpointError(
            f"flush_cache=true while {len(engine.running)} requests paused in place hold cache entries; "
            "nothing was changed. Send flush_cache=false, or pause with mode=retract."
        )
    replace_weights(engine.model, body.path, shapes)
    engine.forget_prefixes()
    if body.weight_version is not None:
        engine.set_version(body.weight_version)
    return len(engine.running)


async def _unsupported(request: web.Request) -> web.Response:
    return _update(False, f"{request.path} is not supported by the embedded server of mcore_rl; use SGLang")


def _reply(data: object, status: int = 200) -> web.Response:
    return web.json_response(data, status=status)


def _update(success: bool, message: str, **fields: object) -> web.Response:
    return _reply({"success": success, "message": _cut(message)} | fields, 200 if success else 400)


def _auth(api_key: str | None) -> Any:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if api_key is not None and request.path not in _OPEN_PATHS:
            given = request.headers.get("Authorization", "")
            # aiohttp decodes headers so that bytes which are not UTF-8 become lone surrogates.
            if not hmac.compare_digest(given.encode(errors="surrogateescape"), f"Bearer {api_key}".encode()):
                return _reply({"error": "Unauthorized"}, 401)
        return await handler(request)

    return check


def _named(hosts: Collection[str]) -> Any:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if hosts and not is_here(request.headers.get("Host", ""), hosts):
            return _malformed("Host: ask for 127.0.0.1 or localhost, or serve with --api-key-env", 403)
        return await handler(request)

    return check


def is_here(host: str, hosts: Collection[str]) -> bool:
    """Whether a Host header names one of `hosts` or an address of loopback, whatever its port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in hosts or ipaddress.ip_address(name).is_loopback
    except ValueError:  # neither a host nor an address
        return False


@web.middleware
async def until_sent(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Send the reply within its deadline, or end the connection: aiohttp would wait for the client."""
    reply = await handler(request)
    try:
        async with asyncio.timeout(bodies.REPLY_SECONDS):
            await reply.prepare(request)
            await reply.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
    return reply


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ValidationError as error:
        return _malformed(reasons(error))
    except MalformedBodyError as error:
        return _malformed(str(error))
    except RequestError as error:
        return _reply({"error": {"message": _cut(str(error))}}, 400)
    except NumericsError as error:
        return _reply({"error": {"message": _cut(str(error))}}, 500)
    except web.HTTPException as error:
        if error.status == 413:
            return _malformed(error.text or "the body is too large", 413)
        if error.status == 408:  # what comes of the body now is not read
            reply = _malformed(error.reason, 408)
            reply.force_close()
            return reply
        return _reply({"detail": error.reason}, error.status)


@web.middleware
async def _json_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.method not in ("GET", "HEAD") and request.content_type != "application/json":
        declared = request.headers.get("Content-Type", "none")
        return _malformed(f"Content-Type must be application/json, got {declared}", 415)
    return await handler(request)


def _cut(message: str) -> str:
    return message if len(message) <= _MESSAGE_CHARS else message[:_MESSAGE_CHARS] + "..."


def _malformed(message: str, status: int = 400) -> web.Response:
    return _reply(
        {"object": "error", "message": _cut(message), "type": "Bad Request", "param": None, "code": status},
        status,
    )
