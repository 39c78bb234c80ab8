"""The HTTP server of the gateway: one of an event loop, on loopback, and a key for every rollout.

    async def rollout(policy, prompt):
        async with serve_policy(policy) as endpoint:
            client = openai.AsyncOpenAI(base_url=endpoint.openai_url, api_key=endpoint.key)
            ...

A request is a turn of the rollout that its key opens. Its address names the rollout as well, so that a key
that got into other hands opens nothing else.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from mcore_rl import strict_json
from mcore_rl.environments.gateway import anthropic_api, openai_api, responses_api
from mcore_rl.environments.gateway.parameters import IGNORE, check_parameters
from mcore_rl.environments.gateway.session import ApiError, GatewaySession
from mcore_rl.environments.gateway.streams import ApiPath, guarded, stream_answer, wait_for_left
from mcore_rl.environments.policy import Policy
from mcore_rl.terminal import escaped

_HOST = "127.0.0.1"
_BODY_BYTES = 8 << 20
_BODY_SECONDS = 60.0
_SHUTDOWN_SECONDS = 5.0
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""half of a pair or a whole one, in the text of JSON"""


@dataclass(frozen=True)
class Endpoint:
    """Where a rollout's policy is reached."""

    url: str
    """`http://127.0.0.1:PORT/ROLLOUT`: the base URL of Anthropic's client"""
    key: str
    """of this rollout alone, as `Authorization: Bearer` or `x-api-key`"""

    @property
    def openai_url(self) -> str:
        """The base URL of OpenAI's client."""
        return f"{self.url}/v1"


class _Gateway:
    """The server of one event loop; it listens while there are rollouts."""

    def __init__(self) -> None:
        self._sessions: dict[str, GatewaySession] = {}
        self._runner: web.AppRunner | None = None
        self._port = 0
        self._lock = asyncio.Lock()

    async def open(
        self, policy: Policy, model: str, ignored: frozenset[str], remedy: str
    ) -> tuple[str, Endpoint]:
        async with self._lock:
            if self._runner is None:
                await self._start()
            name = secrets.token_urlsafe(12)
            key = secrets.token_urlsafe(32)
            self._sessions[name] = GatewaySession(policy, key, model, remedy, ignored)
            return name, Endpoint(f"http://{_HOST}:{self._port}/{name}", key)

    async def close(self, name: str) -> None:
        session = self._sessions.pop(name)
        for request in session.requests:
            request.cancel()
        await wait_for_left(session)
        async with self._lock:
            if not self._sessions and self._runner is not None:
                runner, self._runner = self._runner, None
                await runner.cleanup()

    async def _start(self) -> None:
        app = web.Application(client_max_size=_BODY_BYTES, middlewares=[_errors])
        app.add_routes(
            [
                *(web.post(path, self._route(api)) for path, api in _APIS.items()),
                web.get("/{session}/v1/models", self._models),
            ]
        )
        # A client that has gone wants no answer: what is generated for it ends.
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS
        )
        await runner.setup()
        site = web.TCPSite(runner, _HOST, 0)
        await site.start()
        self._runner, self._port = runner, runner.addresses[0][1]

    def _session(self, request: web.Request) -> GatewaySession:
        """The rollout of an address, where the key is its own; one error for whatever is wrong."""
        given = request.headers.get("x-api-key") or ""
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        if not given and scheme.lower() == "bearer":
            given = bearer.strip()
        session = self._sessions.get(request.match_info["session"])
        expected = secrets.token_urlsafe(32) if session is None else session.key
        right = hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())
        if session is None or not right:
            raise ApiError(401, "no rollout has this address and this key", kind="authentication_error")
        return session

    def _route(self, api: ApiPath) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            session = self._session(request)
            body = await _body(request)
            check_parameters(api.kind, body, session.policy.sampling, session.ignored, session.remedy)
            streams = body.get("stream")
            streams = False if streams is None else streams
            if type(streams) is not bool:
                raise ApiError(400, "stream: expected true or false")
            task = asyncio.current_task()
            assert task is not None
            session.requests.add(task)
            try:
                if streams:
                    return await stream_answer(request, api, session, body)
                name = session.reply_id(api.prefix)
                turn = await guarded(api.ask(session, body, name, None))
                return web.json_response(api.reply(session, body, name, turn))
            finally:
                session.requests.discard(task)

        return handle

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": self._session(request).model, "object": "model", "created": 0, "owned_by": "mcore_rl"}
        return web.json_response({"object": "list", "data": [model]})


_GATEWAYS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Gateway] = weakref.WeakKeyDictionary()


@asynccontextmanager
async def serve_policy(
    policy: Policy, *, model: str = "policy", ignored: Collection[str] = (), remedy: str = IGNORE
) -> AsyncIterator[Endpoint]:
    """Reach the policy of a rollout by HTTP while the block lasts.

    Args:
        model: its name in replies; clients may ask for any.
        ignored: parameters, such as `temperature`, that the agent cannot leave out and that have no effect.
        remedy: what an answer says to do about a parameter that is refused.
    """
    gateway = _GATEWAYS.setdefault(asyncio.get_running_loop(), _Gateway())
    name, endpoint = await gateway.open(policy, model, frozenset(ignored), remedy)
    try:
        yield endpoint
    finally:
        await gateway.close(name)


async def _body(request: web.Request) -> Mapping[str, Any]:
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            data = await request.read()
    except web.RequestPayloadError as error:  # compressed, or in chunks, and not as it says
        raise ApiError(400, f"the body cannot be read: {escaped(error)}") from None
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {_BODY_SECONDS:g} s") from None
    try:
        body = strict_json.parse(data, finite=True)
    except strict_json.JsonError as error:
        raise ApiError(400, f"the body: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object")
    if _SURROGATE.search(data):
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except (
            UnicodeEncodeError
        ):  # a template may leave it out, and a server's parser refuse it: a run's end
            raise ApiError(400, "the body: half of a surrogate pair, which is no text") from None
    return body


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every error in the form of the API that was asked."""
    try:
        return await handler(request)
    except ApiError as error:
        found = error
    except web.HTTPException as error:
        if error.status < 400:
            raise
        found = ApiError(error.status, error.reason, kind=_KINDS.get(error.status, "api_error"))
    api = anthropic_api if request.path.endswith("/messages") else openai_api
    answer = web.json_response(api.error_body(found), status=found.status)
    if request.content.exception() is not None:  # where its body ends is not known: nothing can follow it
        answer.force_close()
    return answer


_KINDS = {404: "not_found_error", 413: "request_too_large"}
_APIS = {
    "/{session}/v1/chat/completions": ApiPath(
        "chat", "chatcmpl-", openai_api.ask_chat, openai_api.chat_reply, openai_api.ChatEvents
    ),
    "/{session}/v1/completions": ApiPath(
        "completions",
        "cmpl-",
        openai_api.ask_completion,
        openai_api.completion_reply,
        openai_api.CompletionEvents,
    ),
    "/{session}/v1/responses": ApiPath(
        "responses",
        "resp_",
        responses_api.ask_response,
        responses_api.response_reply,
        responses_api.ResponseEvents,
    ),
    "/{session}/v1/messages": ApiPath(
        "messages",
        "msg_",
        anthropic_api.ask_message,
        anthropic_api.message_reply,
        anthropic_api.MessageEvents,
    ),
}
