"""What goes wrong ends the command with one message, the right exit code, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from aiohttp import ClientSession, web

from mcore_rl.__main__ import main
from mcore_rl.log import read_metrics
from mcore_rl.rollout.processes import Embedded, LocalServer
from tests.e2e.conftest import ROOT, without_threads
from tests.e2e.ranks import Ranks, Started

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(300)]


PROMPTS, EACH = 8, 4
KEY = "canary-2f6a9c"


def gspo(folder: Path, directory: Path, *flags: str) -> list[str]:
    return [
        *("train", "examples/gspo_tiny.toml", "--run.dir", str(directory)),
        *("--data.train", f"{folder}/train.jsonl", "--data.eval", f"{folder}/eval.jsonl"),
        *("--model.path", f"{folder}/policy", "--train.eval_every", "0", "--optimizer.warmup_steps", "0"),
        *("--reward.function", "tests.e2e.rewards:brevity", "--rollout.threads", "1"),
        *("--rollout.prompts_per_step", str(PROMPTS), "--rollout.samples_per_prompt", str(EACH), *flags),
    ]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--parallel.tensr", "2"], "did you mean parallel.tensor?"),
        (["--train.steps", "0"], "train.steps"),
        (["--algorithm.name", "gsp"], "did you mean 'gspo'?"),
    ],
)
def test_config_mistakes_end_before_any_rank_starts(flags, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n')
    rows = str(tmp_path / "rows.jsonl")
    there = ["--model.path", str(tmp_path), "--data.train", rows, "--data.eval", rows]
    run_dir = ["--run.dir", str(tmp_path / "run")]
    assert main(["train", "examples/gspo_tiny.toml", *run_dir, *there, *flags]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_malformed_line_names_file_line_and_field(ranks: Ranks, folder: Path, tmp_path):
    """All ranks find it, one says it; tests/training/test_setup.py has what else they refuse."""
    broken = tmp_path / "train.jsonl"
    broken.write_text('{"prompt": "1+1=", "label": "2"}\n{"prompt": "1+2="}\n')
    done = ranks.run(*gspo(folder, tmp_path / "run", "--data.train", str(broken)), world=2)
    assert done.returncode == 2
    assert done.stderr.count(f"DataError: {broken}:2:label") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_dead_server_ends_the_run_within_its_deadline(ranks: Ranks, folder: Path, tmp_path):
    flags = [
        "--rollout.urls",
        '["http://127.0.0.1:9"]',
        "--rollout.start_timeout",
        "2.0",
        "--parallel.tensor",
        "1",
    ]
    began = time.monotonic()
    done = ranks.run(*without_threads(gspo(folder, tmp_path, *flags)))
    assert done.returncode == 75, done.stderr
    assert "not ready after 2 s: http://127.0.0.1:9" in done.stderr
    assert time.monotonic() - began < 60
    assert read_metrics(tmp_path / "events.jsonl")[-1]["exit_code"] == 75


def test_a_server_that_ignores_new_weights_is_noticed(ranks: Ranks, folder: Path, server_url: str, tmp_path):
    """Old weights under a new version: SGLang does so when it does not know the names that it is sent."""

    async def train_through_proxy(target: str, other: str) -> tuple[str, subprocess.CompletedProcess[str]]:
        async with forgetful(target, model) as url:
            flags = [
                "--rollout.urls",
                f'["{other}", "{url}"]',
                "--parallel.tensor",
                "1",
                "--train.steps",
                "2",
            ]
            arguments = without_threads(gspo(folder, tmp_path / "run", *flags))
            done = await asyncio.to_thread(ranks.run, *arguments)
            return url, done

    model = folder / "policy"
    with LocalServer(model, Embedded(threads=1), log_file=tmp_path / "server.log") as server:
        url, done = asyncio.run(train_through_proxy(server.url, server_url))
    assert done.returncode == 75, done.stderr
    assert f"WeightSyncError: {url} reports version 1" in done.stderr
    events = read_metrics(tmp_path / "run" / "events.jsonl")
    assert [event["url"] for event in events if event["kind"] == "server_unmoved"] == [url]
    assert "does not hold the published weights, or" in done.stderr


@pytest.mark.timeout(600)
def test_a_killed_server_costs_no_sample_and_comes_back_and_ctrl_c_leaves_no_process_behind(
    ranks: Ranks, folder: Path, tmp_path
):
    """One of two is killed while the run goes on, and returns through a publish; then Ctrl-C reaches all.

    Nothing that the run wrote or said has the servers' key.
    """
    flags = ["--rollout.servers", "2", "--train.steps", "100000", "--rollout.api_key_env", "THE_KEY"]
    flags += ["--reward.function", "tests.e2e.rewards:patient"]
    arguments = gspo(folder, tmp_path, *flags)
    log, events = tmp_path / "log", tmp_path / "events.jsonl"
    process = ranks.start(*arguments, log=log, THE_KEY=KEY)
    try:
        _wait_for(lambda: b"step 1/" in log.read_bytes(), process, 240)
        servers = _servers_of(process)
        assert len(servers) == 2
        servers[0].kill()
        _wait_for(lambda: b"server_returned" in events.read_bytes(), process, 240)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(_servers_of(process)) == 2
        assert len(family) >= 4, "two ranks and two servers"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) in (130, 128 + signal.SIGINT)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert {step["samples"] for step in steps[1:]} == {PROMPTS * EACH}
    assert min(step["rollout/servers"] for step in steps) == 1, "the fault did not fire"
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(b"THE_KEY" in content for content in written.values()), "resolved.toml names the variable"
    assert [path for path, content in written.items() if KEY.encode() in content] == []
    kinds = [event["kind"] for event in read_metrics(events)]
    assert kinds.index("server_lost") < kinds.index("server_returned")


def _servers_of(process: Started) -> list[psutil.Process]:
    family = psutil.Process(process.pid).children(recursive=True)
    return [child for child in family if "mcore_rl.server" in child.cmdline()]


@asynccontextmanager
async def forgetful(target: str, model: Path) -> AsyncIterator[str]:
    """A proxy before a real server: each update's version arrives, the weights stay those of `model`."""

    async def forward(request: web.Request) -> web.Response:
        sent = await request.read()
        if request.path == "/update_weights_from_disk":
            sent = json.dumps(json.loads(sent) | {"model_path": str(model)}).encode()
        headers = {"Content-Type": request.content_type}
        async with (
            ClientSession() as session,
            session.request(request.method, target + request.path, data=sent, headers=headers) as reply,
        ):
            return web.Response(body=await reply.read(), status=reply.status, content_type=reply.content_type)

    app = web.Application(client_max_size=1 << 26)
    app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def _wait_for(condition, process: Started, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.2)
