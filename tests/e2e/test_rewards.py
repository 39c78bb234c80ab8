"""Rewards of whole runs: begun while samples are still missing, and weights that no part has."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from aiohttp import web

from mcore_rl.log import read_metrics
from tests.e2e.ranks import Ranks
from tests.e2e.test_wrong_servers import ASYNC, EACH, PROMPTS, gspo
from tests.rollout.proxy import Fault, proxy_beside

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]
SLOW_SECONDS = 4.0


def late(arrived: list[float]) -> Fault:
    """The server's own reply, some seconds after it has come; `arrived` gets the time."""

    async def wait(request: web.Request, raw: bytes) -> web.Response:
        await asyncio.sleep(SLOW_SECONDS)
        arrived.append(time.time())
        return web.Response(body=raw, content_type="application/json")

    return wait


def to_be_trained(request: web.Request, raw: bytes) -> web.Response:
    return web.Response(body=raw, content_type="application/json")


@pytest.mark.parametrize("flags", [(), ASYNC], ids=["in turns", "beside training"])
def test_what_has_come_is_scored_while_the_rest_is_waited_for(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """Of the calls, the sixth is slow: one of the first step's groups, after the first evaluation's one."""
    witness, arrived = tmp_path / "witness", []
    script = [*[to_be_trained] * 5, late(arrived), *[to_be_trained] * 1000]
    with proxy_beside(server_url, *script) as between:
        start = gspo(folder, tmp_path / "run", between.url, "--eval.sets", "{}", *flags)
        one = ("--reward.function", "tests.e2e.rewards:noted", "--train.steps", "2")
        done = ranks.run(*start, *one, "--parallel.tensor", "1", TEST_WITNESS=str(witness))
    assert done.returncode == 0, done.stderr
    scored = [line.split() for line in witness.read_text().splitlines()]
    times = [float(moment) for moment, name in scored if "@1/" in name]
    assert len(times) == PROMPTS * EACH, "each once"
    (last,) = arrived
    before = [moment for moment in times if moment < last]
    assert len(before) >= EACH, "the control: in one call for all, none is"
    assert min(times) < last - SLOW_SECONDS / 2
    (line,) = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["step"] == 1]
    assert line["samples"] == PROMPTS * EACH


def test_a_weight_of_no_part_ends_the_first_step(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path
) -> None:
    start = gspo(folder, tmp_path, server_url, "--reward.weights.fromat", "0.5")
    done = ranks.run(*start, "--parallel.tensor", "2", world=2)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("reward.weights: no sample of the first step has a part fromat") == 1
    assert "the reward has no parts" in done.stderr
    assert "Traceback" not in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0]
