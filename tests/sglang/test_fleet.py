"""Two real servers, one of which is killed or stopped in mid-generation or mid-publish, and comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mcore_rl.errors import RolloutError
from mcore_rl.rollout.client import Reply, RolloutClient
from mcore_rl.rollout.dispatch import Dispatch, Request
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.rollout.processes import LocalServer
from mcore_rl.weights.disk import publish_directory
from mcore_rl.weights.transport import server_log_probs
from tests.rollout.proxy import proxy_beside
from tests.rollout.support import (
    VOCAB,
    build_model,
    http,
    largest_error,
    log_probs_of,
    save_model,
    wait_until,
)
from tests.sglang.conftest import KEY, KEY_ENV, put_back, two_ranks

LONG = {"max_new_tokens": 450, "ignore_eos": True}
TOKENS = [5, 9, 200, 17, 3, 44, 8, 101]
HEALTH_SECONDS = 12.0
"""a real server's health check takes 1 s when all is well, more on a busy machine"""
SILENCE_SECONDS = 15.0
UPDATE = "/update_weights_from_disk"


@pytest.fixture
def other(other_dense_server: LocalServer) -> LocalServer:
    """A server of two ranks, for these tests to stop, to end and to start; it holds what they left."""
    return other_dense_server


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
    fleet = Fleet([dense_server.url, other.url], vocabulary=VOCAB, api_key_env=KEY_ENV, timeout=60.0)
    fleet.lose({other.url: "stopped"})
    assert [client.url for client in fleet.serving] == [dense_server.url]
    assert publish(fleet, tmp_path / "2", seed=1) == {}
    assert len(fleet.serving) == 2
    check_serves(other.url, seed=1)
    for server in (dense_server, other):
        put_back(server.url, dense_dirs[0])


def test_stopped_in_mid_publish(
    dense_server: LocalServer, other: LocalServer, dense_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Between its pause and its new weights: the publish ends without it, and the next one has it again."""
    with proxy_beside(other.url, path=UPDATE, on_arrival=lambda: send(other, signal.SIGSTOP)) as way:
        fleet = Fleet(
            [way.url, dense_server.url],
            vocabulary=VOCAB,
            api_key_env=KEY_ENV,
            timeout=SILENCE_SECONDS,
        )
        began = time.monotonic()
        try:
            failed = publish(fleet, tmp_path / "2", seed=1)
        finally:
            way.on_arrival = lambda: None
            send(other, signal.SIGCONT)
        assert time.monotonic() - began < 3 * SILENCE_SECONDS
        assert list(failed) == [way.url]
        fleet.lose(failed)
        check_serves(dense_server.url, seed=1)
        wait_until(lambda: bool(fleet.returning()), "it answers again", 60)
        assert len(fleet.serving) == 1, "it serves before it was published to"
        assert publish(fleet, tmp_path / "3", seed=2) == {}
        assert len(fleet.serving) == 2
        check_serves(way.url, seed=2)
    for server in (dense_server, other):
        put_back(server.url, dense_dirs[0])


def test_killed_in_mid_publish_and_started_anew(
    dense_server: LocalServer,
    other: LocalServer,
    dense_dirs: tuple[Path, Path],
    tmp_path: Path,
    several_ranks: None,
) -> None:
    initial = save_model(tmp_path / "initial", build_model(0, spread=0.15))
    with proxy_beside(other.url, path=UPDATE, on_arrival=lambda: send(other, signal.SIGKILL)) as way:
        other.url = way.url
        urls = [way.url, dense_server.url]
        fleet = Fleet(
            urls, vocabulary=VOCAB, api_key_env=KEY_ENV, timeout=60.0, local=[other], initial=initial
        )
        failed = publish(fleet, tmp_path / "2", seed=1)
    assert list(failed) == [way.url]
    check_serves(dense_server.url, seed=1)
    check_return(fleet, failed, dense_server, other, tmp_path)
    put_back(dense_server.url, dense_dirs[0])
    put_back(other.url, dense_dirs[0])


def test_killed_in_mid_generation_and_started_anew(
    dense_server: LocalServer,
    other: LocalServer,
    dense_dirs: tuple[Path, Path],
    tmp_path: Path,
    several_ranks: None,
) -> None:
    replies, lost = ask_all([other.url, dense_server.url], in_mid_generation(other, signal.SIGKILL))
    check_every_sample_once(replies)
    assert list(lost) == [other.url]

    initial = save_model(tmp_path / "initial", build_model(0, spread=0.15))
    urls = [other.url, dense_server.url]
    fleet = Fleet(urls, vocabulary=VOCAB, api_key_env=KEY_ENV, timeout=60.0, local=[other], initial=initial)
    check_return(fleet, lost, dense_server, other, tmp_path)
    put_back(dense_server.url, dense_dirs[0])
    put_back(other.url, dense_dirs[0])


def check_return(
    fleet: Fleet, lost: Mapping[str, str], kept: LocalServer, other: LocalServer, directory: Path
) -> None:
    """A dead server is started anew, misses a publish meanwhile, and serves after the next."""
    fleet.lose(lost)
    fleet.restart_lost()
    assert publish(fleet, directory / "3", seed=1) == {}
    assert [client.url for client in fleet.serving] == [kept.url], "it served while it was starting"
    wait_until(lambda: bool(fleet.returning()), "it answers again", 400)
    assert len(fleet.serving) == 1, "it serves weights that were superseded while it was started"
    assert publish(fleet, directory / "4", seed=2) == {}
    assert {client.url for client in fleet.serving} == {other.url, kept.url}
    check_serves(other.url, seed=2)


@pytest.fixture
def several_ranks() -> Iterator[None]:
    """For a start of `other`."""
    with two_ranks():
        yield


def test_all_lost_is_an_error_within_the_deadline(other: LocalServer) -> None:
    began = time.monotonic()
    try:
        with pytest.raises(RolloutError, match=rf"no rollout server is left:\s+{other.url}: no good answer"):
            ask_all([other.url], in_mid_generation(other, signal.SIGSTOP))
    finally:
        send(other, signal.SIGCONT)
    assert time.monotonic() - began < 5 * HEALTH_SECONDS


def publish(fleet: Fleet, target: Path, seed: int) -> dict[str, str]:
    save_model(target, build_model(seed, spread=0.15))
    shapes = {name: tuple(t.shape) for name, t in load_file(target / "model.safetensors").items()}
    return publish_directory(fleet, target, target.name, shapes)


def check_serves(url: str, seed: int) -> None:
    scores, _ = server_log_probs([RolloutClient(url, api_key_env=KEY_ENV)], [TOKENS], "after")
    want = log_probs_of(build_model(seed, spread=0.15), TOKENS[:1], TOKENS[1:])
    assert largest_error(scores[url][0], want) < 2e-5
