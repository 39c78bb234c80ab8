"""Several servers: who is asked, and what becomes of the requests of one that is lost."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mcore_rl.errors import EXIT_RETRYABLE, ConfigError, RolloutError
from mcore_rl.rollout.client import RejectedError, Reply, RolloutClient
from mcore_rl.rollout.dispatch import Dispatch, Request, no_server_left
from mcore_rl.rollout.fleet import Fleet, check_server_info
from mcore_rl.rollout.processes import Embedded, LocalServer
from mcore_rl.weights.disk import publish_directory
from mcore_rl.weights.online import _tensor_parallel_size
from tests.rollout.proxy import hang, proxy, status
from tests.rollout.support import VOCAB, http, put_back, running, wait_until

PARAMS = {"max_new_tokens": 4, "sampling_seed": 3}
LONG = {"max_new_tokens": 480, "ignore_eos": True}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, dir_a: Path) -> Iterator[LocalServer]:
    """A server that tests may end."""
    server = LocalServer(dir_a, Embedded(threads=1), log_file=tmp_path_factory.mktemp("own") / "server.log")
    yield server
    server.close()


@pytest.fixture
def pair(own: LocalServer, server: LocalServer, fresh_url: str, dir_a: Path) -> Iterator[list[LocalServer]]:
    """Two servers of model_a: the first may be ended or stopped, the session's may be stopped.

    A start is seconds of CPU: the first is started where an earlier test has ended it, else put back.
    """
    if own.process is None or own.process.poll() is not None:
        own.kill()
        own.model_dir = dir_a
        own.start()
    else:
        put_back(own.url, dir_a)
    yield [own, server]
    for one in (own, server):
        assert one.process is not None
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGCONT)


def requests(count: int, params: dict = PARAMS) -> list[Request]:
    return [Request([[i, 3]] * 2, [params] * 2, [f"{i}/0", f"{i}/1"]) for i in range(count)]


def ask_all(
    urls: list[str], asked: list[Request], fault: Callable[[], None] = lambda: None, **options: float
) -> tuple[list[list[Reply]], dict[str, str]]:
    """All replies, and the servers that were lost; `fault` happens when every server has work."""

    async def go() -> tuple[list[list[Reply]], dict[str, str]]:
        clients = [RolloutClient(url, timeout=60.0, retries=1) for url in urls]
        async with Dispatch(
            clients, version="default", health_timeout=options.get("health_timeout", 30.0)
        ) as servers:
            replies = asyncio.gather(*map(servers.ask, asked))
            await asyncio.to_thread(fault)
            return await replies, servers.lost

    return asyncio.run(go())


def every_sample_once(replies: list[list[Reply]], asked: list[Request]) -> None:
    assert [[reply.rid for reply in part] for part in replies] == [list(request.rids) for request in asked]


def end(server: LocalServer, number: signal.Signals) -> Callable[[], None]:
    def act() -> None:
        wait_until(lambda: running(server.url) > 0, "it generates")
        assert server.process is not None
        os.killpg(server.process.pid, number)

    return act


def test_load_is_spread_and_a_prompt_returns_to_its_server(url: str) -> None:
    async def go() -> list[list[str]]:
        async with proxy(url) as one, proxy(url) as two:
            seen: list[list[str]] = []
            for _ in range(2):
                async with Dispatch(
                    [RolloutClient(p.url) for p in (one, two)], version="default", health_timeout=30
                ) as servers:
                    await asyncio.gather(*map(servers.ask, requests(8)))
                    await servers.ask(requests(20)[19])
                seen.append(
                    [rid.partition("~")[0] for sent in one.bodies("/generate") for rid in sent["rid"]]
                )
            return seen

    first, both = asyncio.run(go())
    assert Counter(first)["19/0"] in (0, 1)
    assert len([rid for rid in first if rid != "19/0" and rid != "19/1"]) == 8, "half of 8 x 2 samples each"
    assert Counter(both)["19/0"] in (0, 2), "an idle fleet sends the same prompt elsewhere"


def busiest(leads: int, servers: int, groups: int, *, apart: bool) -> float:
    """Requests at the busiest server over the mean, when every lead has asked `groups` of its own."""
    clients = [RolloutClient(f"http://s{i}") for i in range(servers)]
    loads = Counter()
    for lead in range(leads):
        who = {"lead": lead, "leads": leads} if apart else {}
        dispatch = Dispatch(clients, version="default", health_timeout=30, **who)
        for group in range(groups):
            server = dispatch._choose(Request([[lead, group]], [{}], ["r"]))
            server.load += 1
            loads[server.client.url] += 1
    return max(loads.values()) * servers / (leads * groups)


@pytest.mark.parametrize(
    ("leads", "servers", "groups"), [(64, 64, 8), (64, 64, 1), (64, 16, 3), (4, 16, 8), (4, 6, 3)]
)
def test_leads_that_know_nothing_of_each_other_fill_the_servers_evenly(
    leads: int, servers: int, groups: int
) -> None:
    assert busiest(leads, servers, groups, apart=True) == 1
    assert busiest(leads, servers, groups, apart=False) > 1.1, "negative control"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_server_lost_in_mid_generation_costs_no_sample(
    pair: list[LocalServer], dir_b: Path, number: signal.Signals
) -> None:
    """One that was only stopped goes on later: it serves again, emptied, with the weights of a publish."""
    asked = requests(6, LONG)
    replies, lost = ask_all([s.url for s in pair], asked, end(pair[0], number), health_timeout=4.0)
    every_sample_once(replies, asked)
    assert all(len(reply.token_ids) == 480 for part in replies for reply in part)
    assert list(lost) == [pair[0].url]
    if number == signal.SIGSTOP:
        check_goes_on(pair, lost, dir_b)


def check_goes_on(pair: list[LocalServer], lost: dict[str, str], weights: Path) -> None:
    fleet = Fleet([s.url for s in pair], vocabulary=VOCAB, timeout=60.0)
    fleet.lose(lost)
    stopped, process = pair[0].url, pair[0].process
    assert process is not None
    os.killpg(process.pid, signal.SIGCONT)
    wait_until(lambda: http(stopped, "/health", method="GET").status == 200, "it goes on")
    old = {"input_ids": [1, 3], "sampling_params": LONG}
    with ThreadPoolExecutor(1) as threads:
        nobodys = threads.submit(http, stopped, "/generate", old)
        wait_until(lambda: running(stopped) > 0, "it does what nobody waits for")
        assert [client.url for client in fleet.serving] == [pair[1].url], (
            "it serves before it was published to"
        )
        assert publish_directory(fleet, weights, "7", shapes_in(weights)) == {}
        assert running(stopped) == 0
        assert nobodys.result(60).body["meta_info"]["finish_reason"]["type"] == "abort", "it was emptied"
    assert {client.url for client in fleet.serving} == {s.url for s in pair}
    again = http(stopped, "/generate", {"input_ids": [1, 3], "sampling_params": PARAMS}).body
    assert {span["version"] for span in again["meta_info"]["weight_versions"]} == {"7"}


def shapes_in(directory: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in load_file(directory / "model.safetensors").items()}


@pytest.mark.slow
def test_a_killed_server_is_started_anew_and_serves_only_after_a_publish(
    own: LocalServer, server: LocalServer, dir_a: Path, tmp_path: Path
) -> None:
    """It may have been killed before, by the test above."""
    if own.process is None:
        own.start()
    pair = [own, server]
    initial = shutil.copytree(dir_a, tmp_path / "initial")
    fleet = Fleet([s.url for s in pair], vocabulary=VOCAB, timeout=60.0, local=pair, initial=initial)
    pair[0].kill()
    fleet.lose({pair[0].url: "killed"})
    old = pair[0].url
    fleet.restart_lost()
    again = pair[0].process
    fleet.restart_lost()
    assert pair[0].process is again, "it was starting and was started once more"
    assert pair[0].url in fleet.status.lost
    assert old not in fleet.status.urls
    assert [client.url for client in fleet.serving] == [pair[1].url]
    wait_until(lambda: bool(fleet.returning()), "it answers again", 90)
    assert [client.url for client in fleet.serving] == [pair[1].url], "it serves before it was published to"
    again_lost = fleet.status.lost[pair[0].url]
    assert again_lost == f"started anew, not published to yet; it was {old}, lost because: killed"
    copies = [tmp_path / name for name in ("1", "2")]
    for copy in copies:
        copy.mkdir()
    fleet.published.append(copies[0])
    fleet.mark_published([server.url for server in pair], copies[1])
    assert len(fleet.serving) == 2
    assert fleet.published == [copies[1]]
    assert not copies[0].exists()


@pytest.mark.slow
def test_when_all_are_lost_the_error_names_them_within_its_deadline(pair: list[LocalServer]) -> None:
    def end_both() -> None:
        for server, number in zip(pair, (signal.SIGKILL, signal.SIGSTOP), strict=True):
            end(server, number)()

    began = time.monotonic()
    with pytest.raises(RolloutError) as caught:
        ask_all([s.url for s in pair], requests(6, LONG), end_both, health_timeout=4.0)
    assert time.monotonic() - began < 60
    assert caught.value.exit_code == EXIT_RETRYABLE
    assert all(server.url in str(caught.value) for server in pair)


def test_a_refusal_is_not_asked_elsewhere(url: str) -> None:
    with pytest.raises(RejectedError, match="context length"):
        ask_all([url, url], [Request([[1] * 600], [PARAMS], ["x"])])


def test_a_server_of_another_version_is_lost(fresh_url: str, dir_b: Path) -> None:
    update = {"model_path": str(dir_b), "weight_version": "2"}
    assert http(fresh_url, "/update_weights_from_disk", update).status == 200
    with pytest.raises(RolloutError, match=r"serves weight version \['2'\], not 'default'"):
        ask_all([fresh_url], requests(2))
    fleet = Fleet([fresh_url], vocabulary=VOCAB, timeout=60.0)
    assert publish_directory(fleet, dir_b, "default", shapes_in(dir_b)) == {}
    asked = requests(2)
    every_sample_once(ask_all([fresh_url], asked)[0], asked)


def test_slow_is_not_lost(url: str) -> None:
    """No reply for longer than the health timeout, while health checks are answered."""

    async def go() -> dict[str, str]:
        async with proxy(url, hang(3.0)) as slow:
            async with Dispatch([RolloutClient(slow.url)], version="default", health_timeout=1.5) as servers:
                await servers.ask(requests(1)[0])
            return servers.lost

    assert asyncio.run(go()) == {}


@pytest.mark.parametrize("delivers", [True, False])
def test_a_server_that_delivers_is_kept_though_its_health_checks_fail(url: str, delivers: bool) -> None:
    """And one that neither delivers nor is healthy is lost. A reply takes a while, as in a run."""

    async def go() -> dict[str, str]:
        async with proxy(url, *[status(503)] * 200, path="/health") as ill:
            slow = [hang(0.1)] * 999 if delivers else [hang(60.0)] * 8
            async with proxy(ill.url, *slow) as server:
                client = RolloutClient(server.url)
                async with Dispatch([client], version="default", health_timeout=2.0) as servers:
                    end = time.monotonic() + 5.0

                    async def lane(number: int) -> None:
                        while time.monotonic() < end:
                            await servers.ask(requests(4)[number])

                    await asyncio.gather(*map(lane, range(4)), return_exceptions=not delivers)
                assert len(ill.bodies("/health")) > 3
                return servers.lost

    lost = asyncio.run(go())
    assert [why[:14] for why in lost.values()] == ([] if delivers else ["no good answer"])


def test_errors_of_one_server_move_its_requests(url: str) -> None:
    async def go() -> tuple[list[list[Reply]], dict[str, str]]:
        async with proxy(url, *[status(503)] * 40) as bad:
            clients = [RolloutClient(u, retries=1) for u in (bad.url, url)]
            async with Dispatch(clients, version="default", health_timeout=30) as servers:
                replies = await asyncio.gather(*map(servers.ask, requests(6)))
            return list(replies), servers.lost

    replies, lost = asyncio.run(go())
    every_sample_once(replies, requests(6))
    assert "HTTP 503" in next(iter(lost.values()))


def test_a_server_that_was_started_anew_is_not_given_the_reason_of_its_former_address(tmp_path: Path) -> None:
    """Each url stands beside a reason of its own, however often its server was started."""
    first, kept = "http://127.0.0.1:1", "http://127.0.0.1:2"
    anew = "started anew, not published to yet"
    fleet = Fleet([first, kept], vocabulary=VOCAB)
    fleet.lose({first: f"{first}/generate: no reply"})
    for number in (3, 4):
        fleet._rename(0, f"http://127.0.0.1:{number}")
    lost = dict(fleet.status.lost)
    assert lost == {"http://127.0.0.1:4": f"{anew}; it was {first}, lost because: {first}/generate: no reply"}
    assert f"\n  http://127.0.0.1:4: {anew}; it was {first}" in str(no_server_left(lost))
    fleet.mark_published(["http://127.0.0.1:4"])
    fleet.lose({"http://127.0.0.1:4": "killed"})
    fleet._rename(0, "http://127.0.0.1:5")
    assert fleet.status.lost == {
        "http://127.0.0.1:5": f"{anew}; it was http://127.0.0.1:4, lost because: killed"
    }, "what it was before it served again is no news"


@pytest.mark.parametrize("size", ["two", 0, -1, 2.0, True, None, [2], "\x1b[2J"])
def test_a_server_of_no_number_of_ranks_is_lost_and_its_text_is_not_acted_on(size: object) -> None:
    with pytest.raises(RolloutError, match="http://a:1/server_info: tp_size") as refused:
        _tensor_parallel_size("http://a:1", {"version": "0.5.23", "tp_size": size})
    assert str(refused.value).isprintable()
    assert _tensor_parallel_size("http://a:1", {"version": "0.5.23", "tp_size": 2}) == 2


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({"version": "0.5.20"}, "0.5.21 or newer"),
        ({"version": "0.4.9.post1"}, "0.5.21 or newer"),
        ({}, "unknown version"),
        ({"version": "0.5.23", "dp_size": 2}, "--dp-size"),
        ({"version": "0.5.23", "preferred_sampling_params": {"top_k": 1}}, "--preferred-sampling-params"),
    ],
)
def test_servers_that_cannot_take_part_are_refused(info: dict, says: str) -> None:
    check_server_info("http://a:1", {"version": "0.5.21"})
    check_server_info("http://a:1", {"version": "0.5.23+mcore_rl-embedded", "dp_size": 1})
    with pytest.raises(ConfigError, match=says):
        check_server_info("http://a:1", info)
