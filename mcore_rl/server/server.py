"""`serve`: the embedded server as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import os
import random
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from aiohttp import web
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mcore_rl.directories import write_whole
from mcore_rl.errors import ConfigError
from mcore_rl.server.api import Api, build_app
from mcore_rl.server.engine import Engine
from mcore_rl.server.generate import ModelLimits
from mcore_rl.server.kv_cache import build_cache
from mcore_rl.server.routing import has_experts
from mcore_rl.server.tokenizer import load_tokenizer
from mcore_rl.server.weights import load_model
from mcore_rl.server.worker import Worker
from mcore_rl.terminal import printable, quoted, short

_SHUTDOWN_SECONDS = 2.0
CONNECTION_SECONDS = 30.0
"""Until the headers of a connection's first request, or of its next one, are there: above aiohttp's 15 s, for
which clients keep a connection to use it again."""
_ID_BYTES = 8
"""bytes of a token id in a request, with its comma"""
_MOST_BODY_BYTES = 8 << 20
Extend = Callable[[web.Application, Api, str], None]


def serve(
    model_dir: Path,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    api_key_env: str | None = None,
    threads: int = 2,
    device: str = "cpu",
    max_running_requests: int = 1024,
    max_length: int | None = None,
    kv_tokens: int | None = None,
    random_seed: int = 0,
    max_body_mib: int | None = None,
    address_file: Path | None = None,
    extend: Extend | None = None,
) -> None:
    """Serves an HF decoder in float32 over SGLang's native HTTP API (level 0.5.23) until SIGTERM or SIGINT.

    Args:
        model_dir: local HF checkpoint directory (config.json, safetensors, optionally a tokenizer).
        host: address to bind; one beyond this machine needs a key.
        port: 0 lets the system choose; the log says which.
        api_key_env: name of the environment variable that holds the key; none: no key is asked.
        threads: CPU threads of the model.
        device: cpu or cuda.
        max_running_requests: rows decoded together.
        max_length: longest prompt plus response, in tokens; at most what the model and kv_tokens allow.
        kv_tokens: KV cache size in tokens; none: what fits in 1 GiB. What sessions keep for their next turn
            takes at most as much again.
        random_seed: seeds the draws of requests that bring no sampling_seed.
        max_body_mib: longest request body; none: what the token ids of max_running_requests prompts of
            max_length take, at most 8. A longer one can hold up /health for longer.
        address_file: where its address is written once it answers, as one line; removed at the end.
        extend: adds routes to the application, given the API and the address on this machine.

    Raises ConfigError (bad directory, an option out of range, port in use, key not set, a public host without
    one) and CheckpointError (incomplete weights).
    """
    _check_options(port, threads, device, max_running_requests, kv_tokens, max_body_mib)
    api_key = _read_key(api_key_env)
    with _bind(host, port) as sock:  # before the model is loaded: a port in use is known at once
        if api_key is None:
            _check_private(host, sock)
        torch.set_num_threads(threads)
        api = build_api(model_dir, device, max_running_requests, max_length, kv_tokens, random_seed)
        most = _body_bytes(api.limits.context_length, max_running_requests)
        max_body_bytes = most if max_body_mib is None else max_body_mib << 20
        hosts = {"localhost", host.lower()} if api_key is None else ()  # a page of a browser has no key
        app = build_app(api, api_key=api_key, max_body_bytes=max_body_bytes, hosts=hosts)
        if extend is not None:
            extend(app, api, address_of(sock, here=True))
        asyncio.run(run(app, sock, address_file))


def _check_options(
    port: int,
    threads: int,
    device: str,
    max_running_requests: int,
    kv_tokens: int | None,
    max_body_mib: int | None,
) -> None:
    """Raises ConfigError for the first option with which nothing could be served, or not as it says."""
    ranges = (
        ("port", port, 0, (1 << 16) - 1),
        ("threads", threads, 1, 1 << 10),
        ("max-running-requests", max_running_requests, 1, 1 << 20),
        ("kv-tokens", kv_tokens, 2, 1 << 40),
        ("max-body-mib", max_body_mib, 1, 1 << 20),
    )
    for name, value, low, high in ranges:
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{name} {value}: give a number from {low} to {high}")
    if device != "cpu" and not (re.fullmatch(r"cuda(:\d+)?", device) and torch.cuda.is_available()):
        raise ConfigError(
            f"--device {quoted(device)}: not a device of this machine; give cpu, or cuda with a GPU"
        )


def _body_bytes(context: int, rows: int) -> int:
    """What a full batch of prompts takes as JSON, and 64 KiB for the fields beside them."""
    return min(_ID_BYTES * context * rows + (1 << 16), _MOST_BODY_BYTES)


def build_api(
    model_dir: Path, device: str, max_running: int, max_length: int | None, kv_tokens: int | None, seed: int
) -> Api:
    """The API over a model that is loaded here, with its engine thread running; see `serve`."""
    model, shapes = load_model(model_dir, device)
    cache = build_cache(model, kv_tokens)
    tokenizer = load_tokenizer(model_dir)
    config = model.config.get_text_config()
    bounds = (config.max_position_embeddings, cache.max_length, max_length)
    context = min(bound for bound in bounds if bound is not None)
    if context < 2:
        raise ConfigError(
            f"kv_tokens={kv_tokens} and max_length={max_length} leave {context} tokens; raise them"
        )
    info: dict[str, Any] = {
        "model_path": str(model_dir),
        "served_model_name": str(model_dir),
        "tokenizer_path": str(model_dir),
        "model_type": config.model_type,
        "architectures": model.config.architectures or [type(model).__name__],
        "load_format": "auto",
        "device": device,
        "dtype": "float32",
        "random_seed": seed,
        "max_running_requests": max_running,
        "max_total_num_tokens": cache.capacity,
        "max_req_input_len": context - 1,
        "context_length": context,
        "skip_tokenizer_init": tokenizer is None,
        "tp_size": 1,
        "dp_size": 1,
        "status": "ready",
        "enable_return_routed_experts": has_experts(model),
    }
    eos_ids = _eos_ids(model, model_dir, tokenizer)
    limits = ModelLimits(config.vocab_size, context, eos_ids, has_experts(model))
    worker = Worker(Engine(model, cache, max_running=max_running))
    return Api(worker, limits, tokenizer, shapes, info, random.Random(seed))


async def run(app: web.Application, sock: socket.socket, address_file: Path | None = None) -> None:
    """Serves `app` at `sock` until SIGTERM or SIGINT; says where, and writes it to `address_file`."""
    gc.freeze()  # a collection that looks at the modules and the model takes a tenth of a second
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = build_runner(app)
    await runner.setup()
    try:
        try:
            await web.SockSite(runner, sock).start()
        except OSError as error:
            host, port = sock.getsockname()[:2]
            raise _port_error(host, port, error) from error
        print(printable(f"serving at {address_of(sock)}"), file=sys.stderr, flush=True)
        if address_file is not None:
            write_whole(address_file, f"{address_of(sock)}\n")
        await stop.wait()
    finally:
        await runner.cleanup()
        if address_file is not None:
            address_file.unlink(missing_ok=True)


def build_runner(app: web.Application) -> web.AppRunner:
    """What serves `app`, with its limits of connections."""
    return web.AppRunner(
        app,
        handle_signals=False,
        handler_cancellation=True,
        shutdown_timeout=_SHUTDOWN_SECONDS,
        keepalive_timeout=CONNECTION_SECONDS,
        auto_decompress=False,  # a compressed body could unfold to any size
        access_log=None,
    )


def address_of(sock: socket.socket, *, here: bool = False) -> str:
    """`http://HOST:PORT`; with `here`, as this machine reaches a server of all its addresses."""
    bound, port = sock.getsockname()[:2]
    host = str(bound)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host) if here else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen: clients are refused, not kept waiting, while the model loads."""
    sock: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        if port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except UnicodeError as error:  # no name of a host
        raise ConfigError(f"cannot bind {short(host)}:{port}: {error}; choose another host") from error
    except OSError as error:
        if sock is not None:
            sock.close()
        raise _port_error(host, port, error) from error
    return sock


def _check_private(host: str, sock: socket.socket) -> None:
    if not ipaddress.ip_address(sock.getsockname()[0]).is_loopback:
        raise ConfigError(
            f"--host {host} is open to other machines, and whoever reaches it could change the weights; name "
            "the environment variable of a key with --api-key-env, or serve on 127.0.0.1"
        )


def _port_error(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno != errno.EADDRINUSE:
        return ConfigError(
            f"cannot bind {host}:{port}: {error.strerror or error}; choose another host or port"
        )
    holder = "another user's process"
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            listens = connection.status == psutil.CONN_LISTEN and connection.pid
            if listens and address and address.port == port:
                holder = f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ConfigError(
        f"port {port} on {host} is in use by {holder}; end it or choose another --port (0: any free one)"
    )


def _read_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "")
    if not key:
        raise ConfigError(
            f"api_key_env: the environment variable {name} is not set; export it or drop the option"
        )
    return key


def _eos_ids(
    model: PreTrainedModel, model_dir: Path, tokenizer: PreTrainedTokenizerBase | None
) -> frozenset[int]:
    """End-of-sequence ids of the model, generation_config.json and the tokenizer; all stop, as in SGLang."""
    found = [
        model.config.get_text_config().eos_token_id,
        tokenizer.eos_token_id if tokenizer is not None else None,
    ]
    if (model_dir / "generation_config.json").is_file():
        found.append(GenerationConfig.from_pretrained(model_dir, local_files_only=True).eos_token_id)
    lists = [value if isinstance(value, list) else [value] for value in found if value is not None]
    return frozenset(token for ids in lists for token in ids)
