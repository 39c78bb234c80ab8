"""What the embedded server does under bodies that are made to hurt: its event loop and its health stay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mcore_rl.errors import ConfigError
from mcore_rl.rollout.client import RolloutClient, call
from mcore_rl.rollout.processes import LocalServer
from mcore_rl.server import bodies, server
from mcore_rl.server.api import until_sent
from mcore_rl.server.bodies import MalformedBodyError, encode, parse_json
from mcore_rl.server.server import serve
from tests.environments.served import embedded
from tests.rollout.support import CONTEXT, DEADLINE, VOCAB, http, save_model, wait_until
from tests.server.probed_server import Probed

LAG = 0.1
WAIT = 100.0
"""for a reply; other processes may take most of the machine"""
MIB = 1 << 20


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory, dir_a: Path) -> Iterator[LocalServer]:
    log_file = tmp_path_factory.mktemp("probed") / "server.log"
    with LocalServer(dir_a, Probed(threads=1), log_file=log_file) as running:
        yield running
        running.check()


def post(url: str, path: str, raw: bytes, content_type: str | None = "application/json") -> tuple[int, bytes]:
    """(status, body); the server may answer, and close, before it has read all of `raw`."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\nConnection: close\r\n"
    head += f"Content-Type: {content_type}\r\n\r\n" if content_type else "\r\n"
    with socket.create_connection((host, int(port)), timeout=WAIT) as sock:
        reply = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(head.encode() + raw)
        with contextlib.suppress(ConnectionResetError):
            while chunk := sock.recv(MIB):
                reply += chunk
    return int(reply.split(b" ", 2)[1]), reply.partition(b"\r\n\r\n")[2]


def lag(url: str) -> float:
    return http(url, "/lag", method="GET").body["seconds"]


def repeated(item: bytes, size: int = 8 * MIB - 4096) -> bytes:
    """`item` over and over in a list of so many bytes."""
    return b"[" + b",".join([item] * (size // (len(item) + 1))) + b"]"


BODIES: dict[str, Callable[[], bytes]] = {
    "words for ids": lambda: b'{"input_ids": %s}' % repeated(b'"a"', 781 << 10),
    "8 MiB of words for ids": lambda: b'{"input_ids": %s}' % repeated(b'"a"'),
    "empty lists": lambda: b'{"input_ids": %s}' % repeated(b"[]"),
    "lists of one": lambda: b'{"input_ids": %s}' % repeated(b"[1]"),
    "objects": lambda: b'{"input_ids": [1], "sampling_params": %s}' % repeated(b"{}"),
    "ids": lambda: b'{"input_ids": %s}' % repeated(b"123456"),
    "small ids": lambda: b'{"input_ids": %s}' % repeated(b"1"),
    "floats": lambda: b'{"input_ids": %s}' % repeated(b"1e5"),
    "4290 digits": lambda: b'{"input_ids": %s}' % repeated(b"9" * 4290),
    "5000 digits": lambda: b'{"input_ids": %s}' % repeated(b"9" * 5000),
    "keys": lambda: b"{%s}" % b",".join(b'"%d":1' % i for i in range(700_000)),
    "a few unknown keys": lambda: b"{%s}" % b",".join(b'"%d":1' % i for i in range(5000)),
    "deep": lambda: b'{"input_ids": ' + b"[" * (4 * MIB),
    "deep and closed": lambda: b'{"input_ids": ' + b"[" * 2 * MIB + b"]" * 2 * MIB + b"}",
    "deep objects": lambda: b'{"a":' * MIB,
    "blanks": lambda: b'{"input_ids": [1,' + b" " * 8_000_000 + b"x]}",
    "a long text": lambda: b'{"text": "%s"}' % (b"w1 " * (2 * MIB)),
    "many texts": lambda: b'{"text": %s}' % repeated(b'"w"', 781 << 10),
    "escapes": lambda: b'{"text": "%s"}' % (b"\\u1234" * (MIB + 1)),
    "a long rid": lambda: b'{"input_ids": [1], "rid": "%s"}' % (b"a" * 7 * MIB),
    "many rids": lambda: b'{"input_ids": [1], "rid": %s}' % repeated(b'"a"', 781 << 10),
    "many stop ids": lambda: (
        b'{"input_ids": [1], "sampling_params": {"stop_token_ids": %s, "n": 4096}}'
        % repeated(b"1", MIB // 16)
    ),
    "all log-probs of 4096 copies": lambda: json.dumps(
        {
            "input_ids": [1] * 400,
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": VOCAB,
            "sampling_params": {"n": 4096, "max_new_tokens": 100},
        }
    ).encode(),
    "wrong types": lambda: (
        b'{"input_ids": {}, "text": 5, "rid": 7, "sampling_params": 3, "top_logprobs_num": []}'
    ),
    "no object": lambda: repeated(b"1"),
    "not UTF-8": lambda: b'{"text": "' + b"\xff" * (8 * MIB - 100) + b'"}',
    "too long": lambda: b" " * (9 * MIB),
}
SECONDS_TO_PARSE = ("8 MiB of words for ids", "floats")
"""refused by the parser, which all endpoints share, as the bodies above show that both of them do"""
SLOW = {name: pytest.mark.slow for name in SECONDS_TO_PARSE}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in BODIES])
def test_no_body_holds_the_event_loop(probed: LocalServer, name: str) -> None:
    lag(probed.url)
    body = BODIES[name]()
    for path in ("/generate", "/update_weights_from_disk")[: 1 if name in SECONDS_TO_PARSE else 2]:
        status, reply = post(probed.url, path, body)
        assert 400 <= status < 500, reply[:500]
        assert len(reply) < 8192
        assert lag(probed.url) < LAG


@pytest.mark.slow
def test_the_probe_sees_a_body_that_is_parsed_in_one_go() -> None:
    body = BODIES["lists of one"]()
    start = time.process_time()
    json.loads(body)
    assert time.process_time() - start > 2 * LAG


def test_a_large_request_and_its_reply_do_not_hold_the_event_loop_either(probed: LocalServer) -> None:
    """A quarter of a million ids, and 100 000 log-probs to be shown: they are served."""
    prompts = [[i % 4] * 500 for i in range(512)]
    params = {"max_new_tokens": 2, "ignore_eos": True}
    lag(probed.url)
    body = json.dumps({"input_ids": prompts, "sampling_params": params, "return_logprob": True}).encode()
    status, reply = post(probed.url, "/generate", body)
    assert status == 200, reply[:500]
    assert [len(item["output_ids"]) for item in json.loads(reply)] == [2] * 512
    shown = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 300}
    asked = {"input_ids": [7] * 300, "sampling_params": {"max_new_tokens": 40, "ignore_eos": True}} | shown
    status, reply = post(probed.url, "/generate", json.dumps(asked).encode())
    assert status == 200, reply[:500]
    assert len(json.loads(reply)["meta_info"]["output_top_logprobs"][0]) == 300
    assert lag(probed.url) < LAG


def test_many_small_requests_do_not_hold_the_event_loop(probed: LocalServer) -> None:
    host, port = probed.url.removeprefix("http://").split(":")
    bad = b'{"input_ids": ["a"], "rid": 5}'
    one = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    one += b"Content-Length: %d\r\n\r\n%s"
    lag(probed.url)

    def flood(_: int) -> int:
        with socket.create_connection((host, int(port)), timeout=WAIT) as sock:
            sock.sendall((one % (len(bad), bad)) * 300)
            seen = b""
            while chunk := sock.recv(MIB):
                seen += chunk
                if seen.count(b"HTTP/1.1 400") == 300:
                    break
        return seen.count(b"HTTP/1.1 400")

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(flood, range(8))) == [300] * 8
    assert lag(probed.url) < LAG


# -- JSON in pieces ---------------------------------------------------------------------------------------


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(value=JSON, indent=st.none() | st.integers(0, 3))
def test_parsing_and_writing_in_pieces_agree_with_json(value: Any, indent: int | None) -> None:
    text = json.dumps({"a": value, "b": [*range(-300, 300), value]}, indent=indent)
    assert bodies._Decoder().decode(text) == json.loads(text) == json.loads(encode(json.loads(text)))


@pytest.mark.parametrize(
    "text", ["[1,]", "[1,,2]", "[01]", "[1 2]", "[1", "[1,", "{,}", "[-]", "[1,2,]", "[NaN]", "[1, ]", "[,1]"]
)
def test_what_is_no_json_is_none_in_pieces_either(text: str) -> None:
    raw = f'{{"a": {text}}}'
    for size in (0, 1 << 16):
        with pytest.raises(MalformedBodyError, match="not valid JSON"):
            parse_json(raw.encode() + b" " * size)


# -- any JSON at every endpoint ---------------------------------------------------------------------------

ENDPOINTS: dict[str, tuple[str, ...]] = {
    "/generate": (
        *("input_ids", "text", "rid", "sampling_params", "return_logprob", "logprob_start_len"),
        *("top_logprobs_num", "token_ids_logprob", "return_routed_experts", "stream"),
    ),
    "/abort_request": ("rid", "abort_all"),
    "/begin_weight_update": ("selector",),
    "/end_weight_update": (),
    "/continue_generation": ("torch_empty_cache",),
    "/update_weights_from_disk": ("model_path", "weight_version", "flush_cache", "load_format"),
    "/update_weight_version": ("new_version", "abort_all_requests"),
    "/weights_checker": ("action", "skip_tensor_list"),
    "/flush_cache": (),
    "/nowhere": ("a",),
}
SAMPLING = ("max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "n",
            "stop_token_ids", "ignore_eos", "sampling_seed", "stop", "logit_bias", "unknown")  # fmt: skip
NUMBERS = st.integers() | st.integers(-3, 400) | st.sampled_from([10**400, -(10**400), 1 << 63, -(1 << 63)])
SCALARS = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.floats(allow_nan=True)
    | st.sampled_from([1e308, 1e-320, 5e-7])
    | st.text(st.characters(categories=None), max_size=8)
    | st.sampled_from(["\0", "\ud800", "w1", "/", "/proc/self", "a" * 5000, "checksum", "target"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
SAMPLINGS = st.dictionaries(st.sampled_from(SAMPLING), SCALARS | st.lists(NUMBERS, max_size=3), max_size=5)
IDS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, Any]:
    path = draw(st.sampled_from(sorted(ENDPOINTS)))
    if path == "/generate" and draw(st.booleans()):
        prompts = draw(IDS | st.lists(IDS, max_size=3))
        base = {"input_ids": prompts, "sampling_params": draw(SAMPLINGS | st.lists(SAMPLINGS, max_size=3))}
        names = st.sampled_from([name for name in ENDPOINTS[path] if name not in ("text", *base)])
        return path, base | draw(st.dictionaries(names, VALUES, max_size=3))
    fields = st.sampled_from(ENDPOINTS[path]) if ENDPOINTS[path] else st.text(max_size=3)
    return path, draw(st.dictionaries(fields, VALUES, max_size=4) | VALUES)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=requests())
@example(asked=("/generate", {"text": []}))
def test_any_json_at_any_endpoint_is_served_or_refused(probed: LocalServer, asked: tuple[str, Any]) -> None:
    path, body = asked
    raw = json.dumps(body).encode()
    status, reply = post(probed.url, path, raw)
    assert 200 <= status < 300 or 400 <= status < 500, (status, reply[:500])
    assert http(probed.url, "/health", method="GET").status == 200


@pytest.mark.parametrize(
    "text", ["\0", "\ud800", "a character that the tokenizer lacks: \u20ac", "", ["w1", "\ud800"]], ids=repr
)
def test_a_text_that_cannot_be_encoded_is_refused_with_a_reason(url: str, text: Any) -> None:
    body = {"text": text, "sampling_params": {"max_new_tokens": 1}}
    answer = http(url, "/generate", body)
    assert answer.status in (200, 400)
    if answer.status == 400:
        assert answer.body["error"]["message"]


def test_a_tokenizer_without_an_unknown_token_refuses_a_text_with_one(tmp_path: Path, model_a: Any) -> None:
    directory = save_model(tmp_path / "model", model_a)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["unk_token"] = "absent"
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with embedded(directory) as (url, _):
        for text in ("nothing", "\0", "\ud800", ["w1", "nothing"]):
            answer = http(url, "/generate", {"text": text})
            assert answer.status == 400
            assert "the tokenizer cannot encode the text" in answer.body["error"]["message"]
        answer = http(url, "/generate", {"text": "w1", "sampling_params": {"max_new_tokens": 1}})
        assert answer.status == 200


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": 5}',
        '{"weight_map": null}',
        '{"weight_map": {}}',
        "[" * 100_000,
        '{"weight_map":' * 100_000,
        "\udcff",
    ],
    ids=lambda index: index[:24].encode(errors="surrogateescape").hex()[:12],
)
def test_an_index_of_wrong_types_is_refused(url: str, tmp_path: Path, index: str) -> None:
    raw = index.encode(errors="surrogateescape")
    (tmp_path / "model.safetensors.index.json").write_bytes(raw)
    answer = http(url, "/update_weights_from_disk", {"model_path": str(tmp_path)})
    assert (answer.status, answer.body["success"]) == (400, False)
    assert str(tmp_path) in answer.body["message"]


# -- who may act, and until when --------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
@pytest.mark.parametrize("body", [b"", b"{}", b'{"abort_all": true}'])
def test_what_a_page_in_a_browser_can_send_unasked_does_nothing(
    url: str, content_type: str | None, body: bytes
) -> None:
    for path in ("/pause_generation", "/abort_request", "/update_weights_from_disk", "/generate"):
        status, reply = post(url, path, body, content_type)
        assert status == 415, reply
        assert b"application/json" in reply
    assert http(url, "/ready", method="GET").status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((name, 200) for name in ("127.0.0.1", "localhost", "LOCALHOST:1", "127.0.0.2:80", "[::1]:9")),
        *((name, 403) for name in ("evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "[", "")),
    ],
)
def test_a_page_that_gave_its_own_name_our_address_gets_nothing(url: str, host: str, status: int) -> None:
    """DNS rebinding: to the browser it is the page's own site, which it may ask for anything."""
    assert get(url, "/model_info", host) == status


def get(url: str, path: str, host: str) -> int:
    """The status, of a request that names `host`."""
    where, port = url.removeprefix("http://").split(":")
    with socket.create_connection((where, int(port)), timeout=WAIT) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return int(sock.recv(4096).split(b" ", 2)[1])


def test_a_key_that_is_not_text_is_a_wrong_key(dir_a: Path) -> None:
    with embedded(dir_a, api_key="canary") as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=DEADLINE) as sock:
            sock.sendall(
                b"GET /model_info HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n"
            )
            assert sock.recv(4096).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_host_beyond_this_machine_needs_a_key(dir_a: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"--host .* is open to other machines.*--api-key-env"):
        serve(dir_a, host=host)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("port", 99999),
        ("port", -1),
        ("threads", 0),
        ("device", "tpu\x1b[2J"),
        ("max_running_requests", 0),
        ("kv_tokens", -5),
        ("kv_tokens", 10**11),
        ("max_body_mib", -1),
        ("host", "x" * 300),
    ],
)
def test_an_option_with_which_nothing_could_be_served_is_named(dir_a: Path, option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{option.replace('_', '.')}|cannot bind x"):
        serve(dir_a, **{option: value})


def test_half_sent_requests_end_by_a_deadline(dir_a: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(server, "CONNECTION_SECONDS", 0.5)
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with embedded(dir_a) as (url, _):
        host, port = url.removeprefix("http://").split(":")

        def send(half: bytes) -> None:
            with socket.create_connection((host, int(port)), timeout=DEADLINE) as sock:
                if half:
                    sock.sendall(half)
                start = time.monotonic()
                reply = b""
                while chunk := sock.recv(4096):
                    reply += chunk
                assert time.monotonic() - start < DEADLINE
                assert (b" 408 " in reply) == (b"Content-Length" in half)

        with ThreadPoolExecutor(4) as threads:  # aiohttp waits ten seconds for the end of a body
            list(threads.map(send, (b"", b"POST /gen", head, head + b"Content-Length: 100\r\n\r\n{")))


def test_a_reply_that_nobody_reads_ends_with_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is read arrives whole. The control: by aiohttp alone the other is there after the deadline."""
    monkeypatch.setattr(bodies, "REPLY_SECONDS", 4.0)
    size = 24 * MIB

    async def large(_: web.Request) -> web.Response:
        return web.Response(body=bytes(size))

    async def go(guarded: bool) -> tuple[int, bool]:
        app = web.Application(middlewares=[until_sent] if guarded else [])
        app.add_routes([web.get("/", large)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        _, writer = await asyncio.open_connection(*runner.addresses[0][:2], limit=1 << 12)
        try:
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            async with ClientSession() as session, session.get(url) as got:
                read = len(await got.read())
            assert runner.server is not None
            end = time.monotonic() + (12 if guarded else 5)
            while runner.server.connections and time.monotonic() < end:
                await asyncio.sleep(0.05)
            return read, not runner.server.connections
        finally:
            writer.close()
            await runner.cleanup()

    async def both() -> list[tuple[int, bool]]:
        return await asyncio.gather(go(True), go(False))

    assert asyncio.run(both()) == [(size, True), (size, False)]


# -- health -----------------------------------------------------------------------------------------------


def test_health_is_answered_in_the_middle_of_a_long_step(probed: LocalServer) -> None:
    """One step that admits 48 long prompts; the server says that it is healthy many times meanwhile."""
    prompts = [[i % 300, *[5] * (CONTEXT - 14)] for i in range(96)]
    params = {"max_new_tokens": 4, "ignore_eos": True}
    done = threading.Event()

    def ask() -> int:
        try:
            return http(probed.url, "/generate", {"input_ids": prompts, "sampling_params": params}).status
        finally:
            done.set()

    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(ask)
        slowest, count = 0.0, 0
        while not done.is_set():
            start = time.monotonic()
            assert http(probed.url, "/health", method="GET").status == 200
            slowest, count = max(slowest, time.monotonic() - start), count + 1
            time.sleep(0.005)
        assert asked.result() == 200
    assert count > 20
    assert slowest < 1.0


def test_a_worker_that_hangs_is_unhealthy_and_one_that_waits_is_not(probed: LocalServer) -> None:
    healthy = lambda: http(probed.url, "/health", method="GET").status == 200  # noqa: E731
    time.sleep(1.5)
    assert healthy()
    try:
        assert http(probed.url, "/hang", {}).status == 200
        wait_until(lambda: http(probed.url, "/health", method="GET").status == 503, "it is unhealthy")
        for path in ("/v1/loads", "/model_info", "/server_info"):  # none of them waits for that thread
            assert http(probed.url, path, method="GET").status == 200
    finally:
        http(probed.url, "/let_go", {})
    wait_until(healthy, "it works again")
    assert probed.process is not None
    os.kill(probed.process.pid, signal.SIGSTOP)
    try:
        assert not call(RolloutClient(probed.url), lambda client: client.healthy(1.0))
    finally:
        os.kill(probed.process.pid, signal.SIGCONT)
    wait_until(healthy, "it goes on")
