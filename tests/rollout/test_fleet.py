"""Servers as processes: start, death, keys, ports, and that none outlives its owner."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mcore_rl.errors import ConfigError, RolloutError
from mcore_rl.rollout.client import RolloutClient, call
from mcore_rl.rollout.fleet import wait_ready
from mcore_rl.rollout.processes import Embedded, LocalServer, SGLang
from mcore_rl.server.server import serve
from tests.rollout.support import http, running, wait_until

LONG = {"max_new_tokens": 480, "ignore_eos": True}


@pytest.mark.slow
def test_a_server_with_a_key_closes_promptly_while_it_generates(
    tmp_path: Path, dir_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "canary-secret"
    monkeypatch.setenv("ROLLOUT_TEST_KEY", key)
    server = LocalServer(
        dir_a, Embedded(threads=1, api_key_env="ROLLOUT_TEST_KEY"), log_file=tmp_path / "log"
    )
    server.start()
    process = server.process
    assert process is not None
    for path in ("/generate", "/pause_generation", "/update_weights_from_disk", "/nowhere"):
        for wrong in (None, "wrong", key[:-1]):
            answer = http(server.url, path, {}, key=wrong)
            assert (answer.status, answer.body) == (401, {"error": "Unauthorized"})
    assert http(server.url, "/model_info", method="GET").status == 401
    assert http(server.url, "/model_info", method="GET", key=key).status == 200
    for path in ("/health", "/ready"):
        assert http(server.url, path, method="GET").status == 200

    async def close_midway(client: RolloutClient) -> None:
        asked = asyncio.create_task(client.generate([[1], [2]], [LONG, LONG], ["x", "y"]))
        await asyncio.to_thread(wait_until, lambda: running(server.url, key) == 2, "it generates")
        start = time.monotonic()
        await asyncio.to_thread(server.close)
        assert time.monotonic() - start < 4.5, "SIGTERM did not end it, SIGKILL did"
        await asked

    with pytest.raises(RolloutError, match="no usable reply"):
        call(RolloutClient(server.url, api_key_env="ROLLOUT_TEST_KEY", timeout=20, retries=1), close_midway)
    server.close()
    assert process.returncode == 0
    with pytest.raises(RolloutError, match="ended with code 0"):
        server.check()
    assert not psutil.pid_exists(process.pid)
    assert list(tmp_path.iterdir()) == [tmp_path / "log"]
    assert key not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_server_dies_with_its_owner_and_its_clients_learn_it(tmp_path: Path, dir_a: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mcore_rl.rollout.processes import LocalServer\n"
        "from mcore_rl.rollout.processes import Embedded\n"
        "server = LocalServer(Path(sys.argv[1]), Embedded(threads=1), log_file=Path(sys.argv[2]))\n"
        "server.start()\n"
        "print(server.process.pid, server.url, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(dir_a), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as owner:
        assert owner.stdout is not None
        pid, url = owner.stdout.readline().decode().split()
        assert psutil.pid_exists(int(pid))

        async def kill_midway(client: RolloutClient) -> None:
            asked = asyncio.create_task(client.generate([[1]], [LONG], ["x"]))
            await asyncio.to_thread(wait_until, lambda: running(url) == 1, "it generates")
            os.killpg(owner.pid, signal.SIGKILL)
            await asked

        start = time.monotonic()
        with pytest.raises(RolloutError, match="no usable reply"):
            call(RolloutClient(url, timeout=20, retries=1), kill_midway)
        assert time.monotonic() - start < 15
        assert not call(RolloutClient(url), lambda client: client.ready())
    wait_until(lambda: not psutil.pid_exists(int(pid)), "the orphan ends")


def test_a_port_in_use_is_named_with_its_holder(dir_a: Path, server: LocalServer) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    assert server.process is not None
    with pytest.raises(ConfigError, match=rf"port {port} on .* is in use by process {server.process.pid} "):
        serve(dir_a, port=port)


def test_a_key_variable_that_is_not_set_is_named(dir_a: Path) -> None:
    with pytest.raises(ConfigError, match="ROLLOUT_NO_SUCH_KEY"):
        serve(dir_a, api_key_env="ROLLOUT_NO_SUCH_KEY")


def test_a_directory_without_a_model_ends_with_the_reason(tmp_path: Path) -> None:
    second = LocalServer(tmp_path, Embedded(threads=1), log_file=tmp_path / "log")
    with pytest.raises(RolloutError, match=r"ended with code 2; .*\n.*no config\.json"):
        second.start()
    assert second.process is not None
    assert not psutil.pid_exists(second.process.pid)


def test_waiting_for_absent_servers_ends_and_names_them(server: LocalServer) -> None:
    async def wait() -> None:
        async with RolloutClient(server.url) as here, RolloutClient("http://127.0.0.1:9") as absent:
            await wait_ready([here], timeout=5)
            await wait_ready([here, absent], timeout=0.5)

    with pytest.raises(
        RolloutError, match=r"not ready after 0\.5 s: http://127\.0\.0\.1:9/ready: .*; start the"
    ):
        asyncio.run(wait())


def test_a_server_that_a_dead_trainer_left_paused_is_waited_for_and_serves(fresh_url: str) -> None:
    async def wait() -> None:
        async with RolloutClient(fresh_url) as client:
            await client.pause("retract")
            assert not await client.ready()
            await wait_ready([client], timeout=5)
            assert await client.ready()

    asyncio.run(wait())


def test_sglang_is_not_told_what_torchrun_tells_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process groups would look for their stores in torchrun, for ever."""
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    told = SGLang(Path("python"), dtype="float32").environment()
    assert told["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert told["PYTHONSAFEPATH"] == "1"  # a types.py in the current directory is none of its modules
    assert not {"RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "PYTHONPATH"} & told.keys()
