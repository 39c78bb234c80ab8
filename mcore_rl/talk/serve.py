"""`mcore-rl serve`: the embedded server with its address said, and the gateway's APIs in front of it.

A request to /v1 is a rollout of one turn, or of as many as its conversation has: it gets a policy of its own,
which the gateway serves on loopback, and what the gateway says is passed on.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import aiohttp
from aiohttp import web

from mcore_rl.environments.gateway import serve_policy
from mcore_rl.rollout.client import RolloutClient
from mcore_rl.server import bodies
from mcore_rl.server.api import Api
from mcore_rl.server.bodies import read_json
from mcore_rl.server.options import run_server
from mcore_rl.server.schema import RequestError, parse_sampling
from mcore_rl.talk.policy import SAMPLING, SECONDS, chat_template, policy_of
from mcore_rl.talk.weights import model_of

TEXTS = "/v1/completions"
"""the one that needs no chat template"""
POSTS = ("/v1/chat/completions", TEXTS, "/v1/responses", "/v1/messages")
MODELS = "/v1/models"
REMEDY = "leave it out"
"""of a parameter that is refused"""
_HEADERS = ("Content-Type", "Cache-Control")


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; errors as `server.serve`, and as `model_of`."""
    with model_of(arguments.model_dir) as model:
        name = arguments.model_dir.resolve().name
        extend = partial(add_openai, name=name, api_key_env=arguments.api_key_env)
        return run_server(argparse.Namespace(**vars(arguments) | {"model_dir": model}), extend=extend)


def add_openai(app: web.Application, api: Api, url: str, *, name: str, api_key_env: str | None) -> None:
    """Add the gateway's APIs to the server at `url`, which asks itself.

    Args:
        name: the model's in replies.
        api_key_env: environment variable of the server's key.
    """
    vocabulary = api.limits.vocab_size
    client = RolloutClient(url, api_key_env=api_key_env, timeout=SECONDS, vocabulary=vocabulary)

    async def opened(_: web.Application) -> AsyncIterator[None]:
        async with client:
            yield

    app.cleanup_ctx.append(opened)
    app.add_routes([*(web.post(path, _route(api, client, name)) for path in POSTS)])
    app.router.add_get(MODELS, _route(api, client, name))


def _route(
    api: Api, client: RolloutClient, name: str
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        body = {} if request.method == "GET" else await read_json(request, api.bodies)
        parse_sampling({name: body[name] for name in SAMPLING if body.get(name) is not None})
        if type(body.get("seed")) not in (int, type(None)):
            raise RequestError("seed: expected a whole number")
        template = chat_template(api.tokenizer, name)
        if request.path in POSTS and request.path != TEXTS and not template.tokenizer.chat_template:
            raise RequestError(f"{name} has no chat template; ask {TEXTS}, whose prompt is the whole text")
        policy = policy_of(client, template, api.limits.context_length, body)
        async with serve_policy(policy, model=name, remedy=REMEDY) as endpoint:
            data = None if request.method == "GET" else body
            return await forward(request, endpoint.url + request.path, endpoint.key, data)

    return handle


async def forward(request: web.Request, address: str, key: str, body: Any) -> web.StreamResponse:
    """What `address` answers to `body`, as it comes."""
    headers, limit = {"Authorization": f"Bearer {key}"}, aiohttp.ClientTimeout(total=SECONDS)
    async with (
        aiohttp.ClientSession(timeout=limit) as session,
        session.request(request.method, address, json=body, headers=headers) as reply,
    ):
        return await _passed_on(request, reply)


async def _passed_on(request: web.Request, reply: aiohttp.ClientResponse) -> web.StreamResponse:
    kept = {header: reply.headers[header] for header in _HEADERS if header in reply.headers}
    response = web.StreamResponse(status=reply.status, headers=kept)
    await response.prepare(request)
    try:
        async for chunk in reply.content.iter_any():
            async with asyncio.timeout(bodies.REPLY_SECONDS):
                await response.write(chunk)
        await response.write_eof()
    except (TimeoutError, aiohttp.ClientError):  # it does not read, or the answer is not whole
        if request.transport is not None:
            request.transport.abort()
    return response
