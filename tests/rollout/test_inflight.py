"""Groups in flight at real servers: over a publish, over a lost server, and over a resume."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from mcore_rl.errors import RolloutError
from mcore_rl.rollout.client import Reply, RolloutClient, call
from mcore_rl.rollout.dispatch import Dispatch, Request
from mcore_rl.rollout.inflight import InFlight, PendingGroup, Schedule
from mcore_rl.weights.disk import load_from_disk
from tests.rollout.proxy import Proxy, hang, proxy, proxy_beside, status
from tests.rollout.support import largest_error, log_probs_of, running, wait_until

LENGTH = 300


def group(name: str, length: int = LENGTH, version: int = 0) -> PendingGroup:
    """Two samples of one prompt."""
    params = {"max_new_tokens": length, "ignore_eos": True, "sampling_seed": int(name)}
    return PendingGroup(
        name, version, Request([[int(name), 3]] * 2, [params] * 2, [f"{name}/0", f"{name}/1"])
    )


@contextmanager
def in_flight(
    urls: Sequence[str], extra: int = 0, timeout: float = 60.0, health: float = 30.0
) -> Iterator[InFlight]:
    """Of servers that hold version 0."""
    clients = [RolloutClient(url, timeout=60.0, retries=0) for url in urls]
    dispatch = Dispatch(clients, version="0", health_timeout=health)
    opened = InFlight(dispatch, Schedule(extra=extra, max_staleness=1), timeout=timeout)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def zero(fresh_url: str, dir_a: Path) -> str:
    """The server with model_a as version 0."""
    publish(fresh_url, dir_a, "0")
    return fresh_url


def publish(url: str, directory: Path, version: str) -> None:
    call(RolloutClient(url), lambda client: load_from_disk(client, directory, version))


def every_sample_once(replies: list[Reply], name: str, length: int = LENGTH) -> None:
    assert [reply.rid for reply in replies] == [f"{name}/0", f"{name}/1"]
    assert [len(reply.token_ids) for reply in replies] == [length] * 2


def test_what_runs_is_continued_under_new_weights_and_every_token_says_which(
    zero: str, dir_b: Path, model_a, model_b
) -> None:
    with in_flight([zero]) as groups:
        groups.add([group("5"), group("6")])
        wait_until(lambda: running(zero) == 4, "all samples are being generated")
        groups.expect([RolloutClient(zero)], "1")
        publish(zero, dir_b, "1")
        groups.serve([RolloutClient(zero)], "1")
        for name in ("5", "6"):
            replies = groups.take(1)[name]
            every_sample_once(replies, name)
            for reply in replies:
                assert [span.version for span in reply.versions] == ["0", "1"]
                switch, output = reply.versions[0].end, list(reply.token_ids)
                old, new = (log_probs_of(model, [int(name), 3], output) for model in (model_a, model_b))
                assert largest_error(list(reply.log_probs[:switch]), old[:switch]) < 2e-4
                assert largest_error(list(reply.log_probs[switch:]), new[switch:]) < 2e-4
                assert largest_error(list(reply.log_probs[switch:]), old[switch:]) > 1e-1, "the control"


def test_weights_that_nobody_published_cost_the_server(zero: str, dir_b: Path) -> None:
    with in_flight([zero]) as groups:
        groups.add([group("5")])
        wait_until(lambda: running(zero) == 2, "it generates")
        publish(zero, dir_b, "1")
        with pytest.raises(RolloutError, match=r"serves weight version \['0', '1'\], not '0'"):
            groups.take(1)
        assert list(groups.lost()) == [zero]


def test_after_a_publish_the_old_weights_may_not_answer(zero: str) -> None:
    """A server that was restarted on them, say."""
    with in_flight([zero]) as groups:
        groups.expect([RolloutClient(zero)], "1")
        groups.serve([RolloutClient(zero)], "1")
        groups.add([group("5", 4, version=1)])
        with pytest.raises(RolloutError, match=r"serves weight version \['0'\], not '1'"):
            groups.take(1)


def test_groups_of_one_call_arrive_each_with_its_own_samples(zero: str) -> None:
    """As where nothing is trained before all have arrived; what no schedule knows is asked alike."""

    async def go() -> tuple[int, int]:
        async with proxy(zero) as seen:
            return await asyncio.to_thread(work, seen)

    def work(seen: Proxy) -> tuple[int, int]:
        with in_flight([seen.url]) as groups:
            groups.add([group(str(name), 4) for name in range(4)], per_call=3)
            for name, replies in groups.take(4).items():
                every_sample_once(replies, name, 4)
            first = len(seen.bodies("/generate"))
            begun = groups.begin([group(str(name), 4).request for name in range(8, 13)], per_call=2)
            answers = groups.finish(begun)
            for name, replies in zip(range(8, 13), answers, strict=True):
                every_sample_once(replies, str(name), 4)
            assert groups.groups() == []
            return first, len(seen.bodies("/generate"))

    assert asyncio.run(go()) == (2, 5)


def test_the_early_stop_ends_what_no_step_can_train(zero: str) -> None:
    with in_flight([zero], extra=1) as groups:
        groups.add([group("5", 480), group("6", 4), group("7", 4)])
        assert list(groups.take(1)) == ["6"]
        assert groups.discard(1) == {}
        assert running(zero) > 0, "the slow group goes on"
        assert list(groups.take(1)) == ["7"]
        assert groups.discard(2) == {"5": "unfinished"}
        wait_until(lambda: running(zero) == 0, "its generation has ended")
        assert groups.groups() == []


def test_a_resume_keeps_what_had_finished_and_asks_the_rest_again(zero: str) -> None:
    with in_flight([zero]) as groups:
        groups.add([group("5", 4), group("6", 4)])
        whole = [groups.take(1)["5"], groups.take(1)["6"]]
    with in_flight([zero]) as groups:
        groups.add([group("5"), group("6", 4)])
        wait_until(lambda: groups.groups()[1].replies is not None, "the second has finished")
        saved = groups.groups()
    assert [g.replies is None for g in saved] == [True, False]
    wait_until(lambda: running(zero) == 0, "what was in flight has ended")
    with in_flight([zero]) as groups:
        groups.add([group("5", 4, version=1), saved[1]])
        again, kept = groups.take(1)["5"], groups.take(1)["6"]
    assert [reply.token_ids for reply in again] == [reply.token_ids for reply in whole[0]], "the same seed"
    assert whole[0][0].token_ids != whole[1][0].token_ids, "another seed draws others"
    assert kept == saved[1].replies


def with_proxies(url: str, work: Callable[[list[str]], None]) -> None:
    """`work` in a thread, with a server that never answers a generation and one that does."""

    async def go() -> None:
        async with proxy(url, *[hang(1000.0)] * 8) as stuck, proxy(url) as sound:
            await asyncio.to_thread(work, [stuck.url, sound.url])

    asyncio.run(go())


def test_requests_of_a_server_that_does_not_hold_the_version_move(zero: str, dir_b: Path) -> None:
    """It failed in the publish. It is asked again after the publish that it takes part in, and not before."""

    def work(urls: list[str]) -> None:
        with in_flight(urls) as groups:
            groups.add([group(str(name), 4) for name in range(8)])
            groups.expect([RolloutClient(url) for url in urls], "1")
            publish(zero, dir_b, "1")
            groups.serve([RolloutClient(urls[1])], "1")
            for name, replies in groups.take(8).items():
                every_sample_once(replies, name, 4)
            assert groups.lost() == {}, "whoever published knows it"

    with_proxies(zero, work)


def test_a_lost_server_is_told_once_and_asked_again_after_a_publish(zero: str, dir_b: Path) -> None:
    def work(bad: Proxy, sound: Proxy) -> None:
        with in_flight([bad.url, sound.url]) as groups:
            groups.add([group(str(name), 4) for name in range(8)])
            for name, replies in groups.take(8).items():
                every_sample_once(replies, name, 4)
            assert "HTTP 503" in groups.lost()[bad.url]
            assert groups.lost() == {}
            asked = len(bad.bodies("/generate"))
            assert asked, "the fault fired"
            groups.add([group(str(name), 4) for name in range(8, 16)])
            groups.take(8)
            assert len(bad.bodies("/generate")) == asked
            bad.script.clear()
            groups.expect([RolloutClient(sound.url)], "1")
            publish(zero, dir_b, "1")
            groups.serve([RolloutClient(url) for url in (bad.url, sound.url)], "1")
            groups.add([group(str(name), 4, version=1) for name in range(16, 24)])
            groups.take(8)
            assert len(bad.bodies("/generate")) > asked

    async def go() -> None:
        async with proxy(zero, *[status(503)] * 40) as bad, proxy(zero) as sound:
            await asyncio.to_thread(work, bad, sound)

    asyncio.run(go())


def test_what_runs_on_a_server_that_another_replica_lost_moves_before_the_publish_ends_it(zero: str) -> None:
    """`Fleet.returning` aborts all requests there: its samples would come back as aborted by the server."""

    def work(urls: list[str]) -> None:
        with in_flight(urls) as groups:
            groups.add([group(str(name), 4) for name in range(8)])
            groups.expect([RolloutClient(urls[1])], "1")
            for name, replies in groups.take(8).items():
                every_sample_once(replies, name, 4)
            assert groups.lost() == {}, "it is known"

    with_proxies(zero, work)


def test_a_server_is_not_given_up_for_its_health_while_it_takes_weights(zero: str) -> None:
    """SGLang answers /health with 503 while it is paused (H20)."""
    with (
        proxy_beside(zero, *[status(503)] * 1000, path="/health") as sick,
        in_flight([sick.url], health=0.4) as groups,
    ):
        groups.expect([RolloutClient(sick.url)], "1")
        groups.add([group("5")])
        call(RolloutClient(zero), lambda client: client.pause("retract"))
        wait_until(lambda: len(sick.calls) > 8, "two health timeouts pass")
        call(RolloutClient(zero), lambda client: client.resume())
        groups.serve([RolloutClient(sick.url)], "1")
        sick.script.clear()
        every_sample_once(groups.take(1)["5"], "5")
        sick.script += [status(503)] * 1000
        groups.add([group("6", 480)])
        call(RolloutClient(zero), lambda client: client.pause("retract"))
        wait_until(lambda: bool(groups.lost()), "the control: without a publish it is given up")


def test_groups_that_do_not_come_end_the_wait(zero: str) -> None:
    def work(urls: list[str]) -> None:
        with in_flight(urls[:1], timeout=1.0) as groups:
            groups.add([group("5")])
            with pytest.raises(RolloutError, match=r"did not answer within 1 s.*raise train.step_timeout"):
                groups.take(1)

    with_proxies(zero, work)
