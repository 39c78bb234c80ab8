"""Two real servers, one of which is killed or stopped in mid-generation, and comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mcore_rl.errors import RolloutError
from mcore_rl.rollout.client import Reply, RolloutClient
from mcore_rl.rollout.dispatch import Dispatch, Request
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.rollout.local import LocalServer
from mcore_rl.weights.publish import publish_directory, server_log_probs
from tests.rollout.support import build_model, http, largest_error, log_probs_of, save_model, wait_until
from tests.sglang.conftest import KEY, KEY_ENV, put_back, sglang_server

LONG = {"max_new_tokens": 450, "ignore_eos": True}
TOKENS = [5, 9, 200, 17, 3, 44, 8, 101]
HEALTH_SECONDS = 12.0
"""a real server's health check takes 1 s when all is well, more on a busy machine"""


@pytest.fixture(scope="module")
def other(dense_dirs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A second dense server, for these tests to end and start."""
    log_file = tmp_path_factory.mktemp("other") / "log"
    with sglang_server(dense_dirs[0], log_file, key=KEY_ENV) as server:
        yield server


def ask_all(
    urls: list[str], fault: Callable[[], None], health_timeout: float = HEALTH_SECONDS
) -> tuple[list[list[Reply]], dict[str, str]]:
    """Replies to 8 requests of 2 long samples, `fault` in mid-generation, and the servers that were lost."""
    asked = [Request([[i, 3]] * 2, [LONG] * 2, [f"{i}/0", f"{i}/1"]) for i in range(8)]

    async def go() -> tuple[list[list[Reply]], dict[str, str]]:
        clients = [RolloutClient(url, api_key_env=KEY_ENV, timeout=200.0, retries=1) for url in urls]
        async with Dispatch(clients, version="default", health_timeout=health_timeout) as servers:
            replies = asyncio.gather(*map(servers.ask, asked))
            await asyncio.to_thread(fault)
            return await replies, servers.lost

    return asyncio.run(go())


def check_every_sample_once(replies: list[list[Reply]]) -> None:
    assert [reply.rid for part in replies for reply in part] == [f"{i}/{k}" for i in range(8) for k in (0, 1)]
    assert all(len(reply.token_ids) == 450 for part in replies for reply in part)


def in_mid_generation(server: LocalServer, number: signal.Signals) -> Callable[[], None]:
    """Sends the signal to every process of the server while it decodes."""

    def act() -> None:
        def used() -> int:
            return http(server.url, "/v1/loads", method="GET", key=KEY).body["loads"][0]["num_used_tokens"]

        wait_until(lambda: used() > 100, "it decodes")
        send(server, number)

    return act


def send(server: LocalServer, number: signal.Signals) -> None:
    assert server.process is not None
    os.killpg(server.process.pid, number)


def test_stopped_in_mid_generation(dense_server: LocalServer, other: LocalServer) -> None:
    try:
        replies, lost = ask_all([other.url, dense_server.url], in_mid_generation(other, signal.SIGSTOP))
    finally:
        send(other, signal.SIGCONT)
    check_every_sample_once(replies)
    assert list(lost) == [other.url]
    assert "health check" in lost[other.url]


def test_a_server_that_goes_on_is_emptied_and_published_to_before_it_serves(
    dense_server: LocalServer, other: LocalServer, dense_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    """It was never told to end: what it was doing when it was lost is nobody's, and its weights are old."""
    fleet = Fleet([dense_server.url, other.url], api_key_env=KEY_ENV, timeout=60.0)
    fleet.lose({other.url: "stopped"})
    assert [client.url for client in fleet.serving] == [dense_server.url]
    publish(fleet, tmp_path / "2", seed=1)
    assert len(fleet.serving) == 2
    check_serves(other.url, seed=1)
    for server in (dense_server, other):
        put_back(server.url, dense_dirs[0])


def test_killed_in_mid_generation_and_started_anew(
    dense_server: LocalServer, other: LocalServer, dense_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    replies, lost = ask_all([other.url, dense_server.url], in_mid_generation(other, signal.SIGKILL))
    check_every_sample_once(replies)
    assert list(lost) == [other.url]

    initial = save_model(tmp_path / "initial", build_model(0, spread=0.15))
    urls = [other.url, dense_server.url]
    fleet = Fleet(urls, api_key_env=KEY_ENV, timeout=60.0, local=[other], initial=initial)
    fleet.lose(lost)
    fleet.restart_lost()
    publish(fleet, tmp_path / "2", seed=1)
    assert [client.url for client in fleet.serving] == [dense_server.url], "it served while it was starting"
    wait_until(lambda: bool(fleet.returning()), "it answers again", 400)
    assert len(fleet.serving) == 1, "it serves weights that were superseded while it was started"
    publish(fleet, tmp_path / "3", seed=2)
    assert {client.url for client in fleet.serving} == {other.url, dense_server.url}
    check_serves(other.url, seed=2)
    put_back(dense_server.url, dense_dirs[0])


def test_all_lost_is_an_error_within_the_deadline(other: LocalServer) -> None:
    began = time.monotonic()
    try:
        with pytest.raises(RolloutError, match=rf"no rollout server is left:\s+{other.url}: no good answer"):
            ask_all([other.url], in_mid_generation(other, signal.SIGSTOP))
    finally:
        send(other, signal.SIGCONT)
    assert time.monotonic() - began < 5 * HEALTH_SECONDS


def publish(fleet: Fleet, target: Path, seed: int) -> None:
    save_model(target, build_model(seed, spread=0.15))
    shapes = {name: tuple(t.shape) for name, t in load_file(target / "model.safetensors").items()}
    assert publish_directory(fleet, target, target.name, shapes) == {}


def check_serves(url: str, seed: int) -> None:
    scores, _ = server_log_probs([RolloutClient(url, api_key_env=KEY_ENV)], [TOKENS], "after")
    want = log_probs_of(build_model(seed, spread=0.15), TOKENS[:1], TOKENS[1:])
    assert largest_error(scores[url][0], want) < 2e-5
