"""A model is served over OpenAI's API and talked to in the terminal: the real commands, a tiny model."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import openai
import pytest
import torch
from aiohttp import web
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from mcore_rl.errors import ConfigError
from mcore_rl.server import bodies
from mcore_rl.server.api import build_app
from mcore_rl.server.server import address_of, build_api
from mcore_rl.talk.serve import add_openai, forward
from mcore_rl.talk.weights import model_of
from tests.environments.support import build_tokenizer
from tests.launched import ENVIRONMENT
from tests.rollout.support import http, wait_until
from tests.sources import ROOT

pytestmark = [pytest.mark.xdist_group("talk"), pytest.mark.timeout(300)]
SECRET = {"TALK_KEY": "a-key-of-the-test"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a chat template."""
    directory, tokenizer = tmp_path_factory.mktemp("talk") / "model", build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.5,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Served:
    """A server that a command started."""

    url: str
    said: Path
    tokenizer: PreTrainedTokenizerBase

    def client(self, key: str = SECRET["TALK_KEY"]) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    said, address = model.parent / "said", model.parent / "address"
    command = [sys.executable, "-m", "mcore_rl", "serve", str(model), "--threads", "1"]
    command += ["--address-file", str(address), "--api-key-env", "TALK_KEY"]
    with said.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | ENVIRONMENT | SECRET, stdout=out, stderr=out
        )
    try:
        wait_until(lambda: address.exists() or process.poll() is not None, "it serves", 200)
        yield Served(address.read_text().strip(), said, AutoTokenizer.from_pretrained(model))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not address.exists(), "nobody answers there any more"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_it_says_where_it_is(served: Served) -> None:
    assert f"serving at {served.url}\n" in served.said.read_text()
    assert served.url.startswith("http://127.0.0.1:")


def test_a_client_of_openai_has_a_conversation(served: Served) -> None:
    client = served.client()
    assert [one.id for one in client.models.list().data] == ["model"]
    said = [{"role": "user", "content": "12?"}]
    first = client.chat.completions.create(model="model", messages=said, max_tokens=5, temperature=0)
    text = first.choices[0].message.content
    rendered = served.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    params = {"max_new_tokens": 5, "temperature": 0}
    native = http(
        served.url, "/generate", {"input_ids": rendered, "sampling_params": params}, key=SECRET["TALK_KEY"]
    ).body
    assert first.usage is not None
    assert first.usage.prompt_tokens == len(rendered)
    assert text == native["text"], "what SGLang's API answers to the ids that the template gives"
    said += [{"role": "assistant", "content": text}, {"role": "user", "content": "34?"}]
    second = client.chat.completions.create(model="model", messages=said, max_tokens=5, temperature=0)
    assert second.usage is not None
    assert second.usage.prompt_tokens > len(rendered) + 5
    pieces = client.chat.completions.create(
        model="model", messages=said[:1], max_tokens=5, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text


def test_sampling_parameters_act_and_what_would_not_is_refused(served: Served) -> None:
    client = served.client()

    def ask(**params) -> str:
        return client.completions.create(model="m", prompt="12", max_tokens=12, **params).choices[0].text

    assert ask(temperature=0) == ask(temperature=0)
    assert ask(temperature=5.0, seed=1) == ask(temperature=5.0, seed=1)
    assert len({ask(temperature=5.0) for _ in range(4)}) > 1
    for wrong in ({"frequency_penalty": 1.0}, {"temperature": -1.0}, {"seed": "1"}):
        with pytest.raises(openai.APIStatusError) as refused:
            ask(**wrong)
        assert refused.value.status_code == 400
    with pytest.raises(openai.BadRequestError, match="tokens"):
        client.completions.create(model="m", prompt="1" * 700, max_tokens=2)


def test_the_key_opens_these_addresses_too(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        served.client("another").models.list()
    assert http(served.url, "/v1/chat/completions", {"messages": []}).status == 401
    reply = http(served.url, "/v1/chat/completions", {"messages": []}, key=SECRET["TALK_KEY"])
    assert reply.status == 400
    assert "messages" in reply.body["error"]["message"]


def test_a_model_without_a_chat_template_says_where_to_ask(model: Path, tmp_path: Path) -> None:
    """And what is refused says no remedy but those of this server."""
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(bare)

    async def answers() -> list[tuple[int, str]]:
        api = build_api(bare, "cpu", 4, None, None, 0)
        app = build_app(api, api_key=None, max_body_bytes=1 << 20)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            url = address_of(sock)
            add_openai(app, api, url, name="bare", api_key_env=None)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.SockSite(runner, sock).start()
            try:
                async with aiohttp.ClientSession() as session:
                    found = []
                    for path, body in (
                        ("chat/completions", {"messages": [{"role": "user", "content": "1"}]}),
                        ("completions", {"prompt": "1", "max_tokens": 2, "n": 2}),
                        ("completions", {"prompt": "1", "max_tokens": 2, "stop": ["2"]}),
                        ("completions", {"prompt": "1", "max_tokens": 2}),
                    ):
                        async with session.post(f"{url}/v1/{path}", json={"model": "bare"} | body) as reply:
                            found.append((reply.status, await reply.text()))
                    return found
            finally:
                await runner.cleanup()

    (chat_status, chat_said), *refused, (status, _) = asyncio.run(answers())
    assert chat_status == 400
    assert "bare has no chat template; ask /v1/completions, whose prompt is the whole text" in chat_said
    for parameter, (code, said) in zip(("n", "stop"), refused, strict=True):
        assert code == 400
        assert f"{parameter}: " in said
        assert "leave it out" in said
        assert "serve_policy" not in said
    assert status == 200


async def listening(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> tuple[web.AppRunner, int]:
    """A server on this machine, and its port."""
    app = web.Application()
    app.router.add_route("*", "/", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, runner.addresses[0][1]


def test_a_long_answer_is_waited_for_and_a_client_that_does_not_read_is_left(monkeypatch) -> None:
    monkeypatch.setattr(aiohttp.client, "DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.2))  # else 5 minutes
    monkeypatch.setattr(bodies, "REPLY_SECONDS", 0.3)

    async def whole() -> str:
        left = asyncio.Event()

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.method == "GET":
                await asyncio.sleep(0.5)
                return web.Response(text="late")
            response = web.StreamResponse()
            await response.prepare(request)
            while True:
                await response.write(bytes(1 << 20))

        behind, port = await listening(answer)

        async def passed(request: web.Request) -> web.StreamResponse:
            try:
                return await forward(request, f"http://127.0.0.1:{port}/", "a-key", None)
            finally:
                left.set()

        front, port_of_front = await listening(passed)
        url = f"http://127.0.0.1:{port_of_front}/"
        patient = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=patient) as session, session.get(url) as reply:
            late = await reply.text()
        left.clear()
        _, silent = await asyncio.open_connection("127.0.0.1", port_of_front)
        silent.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        try:
            await asyncio.wait_for(left.wait(), 20)
        finally:
            silent.transport.abort()
            for runner in (front, behind):
                await runner.cleanup()
        return late

    assert asyncio.run(whole()) == "late"


def chat(*arguments: str, given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mcore_rl", "chat", *arguments, "--threads", "1", "--temperature", "0"],
        input=given,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
def test_a_pipe_gets_an_answer_for_every_line(served: Served, model: Path) -> None:
    """The same question the same answer: each line is a conversation of its own."""
    done = chat(str(model), "--max-tokens", "5", given="12?\n\n34?\n12?\n")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.split("\n")[:-1]
    said = [{"role": "user", "content": "12?"}]
    answer = served.client().chat.completions.create(
        model="model", messages=said, max_tokens=5, temperature=0
    )
    assert first == third == (answer.choices[0].message.content or "").replace("\n", "\\n")
    assert isinstance(second, str)


def test_what_is_no_model_is_refused_in_words(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"neither a run directory .* nor a Hugging Face model"),
        model_of(tmp_path),
    ):
        pass
    (tmp_path / "config.json").write_text("{}")
    with model_of(tmp_path) as found:
        assert found == tmp_path
    with (
        pytest.raises(ConfigError, match=r"--checkpoint: .* is no run directory"),
        model_of(tmp_path, "latest"),
    ):
        pass
