"""Faults on the wire to a real server, made by a small proxy: nothing is lost, doubled or mixed up."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mcore_rl.errors import RolloutError, WeightSyncError
from mcore_rl.rollout.client import Reply, RolloutClient
from mcore_rl.rollout.dispatch import Dispatch, Request
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.weights.disk import publish_directory
from mcore_rl.weights.transport import server_log_probs
from tests.rollout.proxy import Fault, Proxy, body, cut, damaged, hang, proxy, proxy_beside, status
from tests.rollout.support import VOCAB, build_moe_model, largest_error, log_probs_of, running, wait_until

PROMPTS = [[1, 2, 3], [4, 5]]
GREEDY = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
TOKENS = [5, 9, 200, 17, 3, 44, 8, 101]

WIRE = [status(500), status(503), *(cut(share) for share in (0.0, 0.6)), body(lambda raw: b"")]


def through(url: str, *script: Fault, **options: Any) -> tuple[list[Reply] | RolloutError, Proxy]:
    """The outcome of a greedy `generate` through a proxy with this script, and what the proxy saw."""

    async def run() -> tuple[list[Reply] | RolloutError, Proxy]:
        settings = {"timeout": 30.0, "retries": 2} | options
        async with proxy(url, *script) as state, RolloutClient(state.url, **settings) as client:
            try:
                replies = await client.generate(PROMPTS, [GREEDY] * 2, ["a", "b"], prompt_log_probs=True)
            except RolloutError as error:
                return error, state
            return replies, state

    return asyncio.run(run())


def check_same(replies: list[Reply] | RolloutError, clean: list[Reply] | RolloutError) -> None:
    assert isinstance(replies, list), replies
    assert isinstance(clean, list)
    for reply, want in zip(replies, clean, strict=True):
        assert (reply.rid, reply.token_ids, reply.versions) == (want.rid, want.token_ids, want.versions)
        assert reply.log_probs == pytest.approx(want.log_probs, abs=2e-5)
        assert reply.prompt_log_probs == pytest.approx(want.prompt_log_probs, abs=2e-5)


@pytest.mark.parametrize(
    "fault",
    [
        *WIRE,
        damaged(lambda reply: reply["meta_info"].update(id="another")),
        damaged(lambda reply: reply["meta_info"]["output_token_logprobs"].pop()),
        damaged(lambda reply: reply["meta_info"]["output_token_logprobs"][0].__setitem__(0, float("nan"))),
        damaged(lambda reply: reply["meta_info"]["weight_versions"].clear()),
    ],
)
def test_a_lost_or_damaged_reply_is_asked_for_again(moe_url: str, fault: Fault) -> None:
    outcome, seen = through(moe_url, fault)
    check_same(outcome, through(moe_url)[0])
    assert not seen.script, "the fault did not fire"
    assert len(seen.bodies("/generate")) == 2


def test_a_slow_reply_costs_the_deadline_and_nothing_runs_on(moe_url: str) -> None:
    began = time.monotonic()
    outcome, _ = through(moe_url, hang(60), timeout=3.0)
    assert isinstance(outcome, RolloutError)
    assert "no reply within 3 s" in str(outcome)
    assert time.monotonic() - began < 15
    wait_until(lambda: running(moe_url) == 0, "nobody waits for it")


def other_version(reply: dict[str, Any]) -> None:
    reply["meta_info"]["weight_versions"][0]["version"] = "3"


@pytest.mark.parametrize(
    ("fault", "says"), [(damaged(other_version), "serves weight version"), (status(502), "HTTP 502")]
)
def test_of_two_ways_to_the_servers_a_bad_one_is_given_up(moe_url: str, fault: Fault, says: str) -> None:
    """Every sample once; what still runs there when its address is given up is asked for over the other."""
    asked = [Request([[i, 3]] * 2, [GREEDY] * 2, [f"{i}/0", f"{i}/1"]) for i in range(6)]

    async def go() -> tuple[list[list[Reply]], dict[str, str], str]:
        async with proxy(moe_url, *[fault] * 20) as bad:
            clients = [RolloutClient(url, timeout=60.0, retries=1) for url in (bad.url, moe_url)]
            async with Dispatch(clients, version="default", health_timeout=60) as servers:
                return await asyncio.gather(*map(servers.ask, asked)), servers.lost, bad.url

    replies, lost, bad_url = asyncio.run(go())
    assert [reply.rid for part in replies for reply in part] == [rid for one in asked for rid in one.rids]
    assert list(lost) == [bad_url]
    assert says in lost[bad_url]


@pytest.mark.parametrize("path", ["/pause_generation", "/update_weights_from_disk", "/continue_generation"])
@pytest.mark.parametrize("fault", WIRE)
def test_a_publish_survives_a_fault_at_every_call(
    moe_url: str, moe_dirs: tuple[Path, Path], path: str, fault: Fault
) -> None:
    """Each call may be made twice: the server did what was asked, and only its answer was lost."""
    with proxy_beside(moe_url, fault, path=path) as seen:
        fleet = Fleet([seen.url], vocabulary=VOCAB, timeout=60.0)
        assert publish_directory(fleet, moe_dirs[1], "4", shapes(moe_dirs[1])) == {}
        assert not seen.script, "the fault did not fire"
        scores, _ = server_log_probs(fleet.serving, [TOKENS], "wire")
    fresh, stale = (log_probs_of(build_moe_model(seed), TOKENS[:1], TOKENS[1:]) for seed in (1, 0))
    assert largest_error(scores[seen.url][0], fresh) < 2e-5
    assert largest_error(scores[seen.url][0], stale) > 1e-2


def test_a_server_that_says_no_success_ends_the_publish(moe_url: str, moe_dirs: tuple[Path, Path]) -> None:
    """HTTP 200 and success false is a refusal, and the server serves on."""
    no = body(lambda raw: b'{"success": false, "message": "scripted"}')
    with proxy_beside(moe_url, no, path="/update_weights_from_disk") as seen:
        with pytest.raises(WeightSyncError, match="scripted"):
            publish_directory(
                Fleet([seen.url], vocabulary=VOCAB, timeout=60.0),
                moe_dirs[0],
                "4",
                shapes(moe_dirs[0]),
            )
        assert seen.calls[-1][0] == "/continue_generation", "it would stay paused"


def shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in load_file(directory / "model.safetensors").items()}
