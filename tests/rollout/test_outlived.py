"""Rollouts that outlive the bound of staleness, on a real server whose weights change under them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mcore_rl.environments.dialogue import ChatTemplate
from mcore_rl.environments.policy import RolloutLimits
from mcore_rl.environments.run import Environment, Environments
from mcore_rl.rollout.client import RolloutClient, call
from mcore_rl.rollout.dispatch import Dispatch, Request
from mcore_rl.rollout.inflight import InFlight, PendingGroup, Schedule
from mcore_rl.training.stale_tokens import without_stale_tokens
from mcore_rl.types import Group, Prompt, Sample
from mcore_rl.weights.disk import load_from_disk
from tests.environments.support import build_tokenizer
from tests.rollout.support import VOCAB, wait_until

NEW, BOUND = 5, 1
PROMPT = Prompt("p", "", (5, 6, 7), "")


class Gate:
    """An environment of three turns, each of which waits until it is let."""

    def __init__(self) -> None:
        self.turns, self.open = 0, 0
        self.ended: list[str] = []

    async def rollout(self, policy, prompt) -> float:
        ids = [*prompt.token_ids]
        try:
            for turn in range(3):
                while self.open < turn:
                    await asyncio.sleep(0.01)
                said = await policy.generate(ids)
                ids = [*said.prompt_ids, *said.token_ids, 9]
                self.turns += 1
            return 1.0
        finally:
            self.ended.append(policy.progress.limit)


def play(url: str, weights: list[Path], outlived: str) -> tuple[Mapping[str, str], Sample | None]:
    """A turn under each of the versions 0, 1 and 2; what step 2 discards, and the sample of step 3."""
    gate = Gate()
    limits = RolloutLimits(8, 200, 60.0, 60.0)
    template = ChatTemplate(build_tokenizer())
    environments = Environments(Environment("m:f", gate.rollout, template, limits, {}))
    clients = [RolloutClient(url, timeout=60.0, retries=0, vocabulary=VOCAB)]
    schedule = Schedule(extra=1, max_staleness=BOUND, outlives=outlived != "drop")
    params: dict[str, Any] = {"max_new_tokens": NEW, "ignore_eos": True, "sampling_seed": 3}
    request = Request([PROMPT.token_ids], [params], ["p@1/0"], None, PROMPT)
    dispatch = Dispatch(clients, version="0", health_timeout=30.0)
    flight = InFlight(dispatch, schedule, timeout=60.0, player=environments, cuts=outlived == "cut")

    def publish(version: str, directory: Path) -> None:
        flight.expect(clients, version)
        call(RolloutClient(url), lambda client: load_from_disk(client, directory, version))
        flight.serve(clients, version)

    def turn(count: int) -> None:
        gate.open = count - 1
        wait_until(lambda: gate.turns == count, f"turn {count} is sampled")

    try:
        flight.add([PendingGroup("p@1", 0, request)])
        turn(1)
        publish("1", weights[1])
        turn(2)
        publish("2", weights[0])
        discarded = flight.discard(2)
        if outlived == "finish":
            turn(3)
        gate.open = 2  # a rollout that was cut asks for the third turn in vain
        if discarded:
            return discarded, None
        (samples,) = flight.take(1).values()
        (sample,) = samples
        assert isinstance(sample, Sample)
        return discarded, sample
    finally:
        flight.close()
        environments.close()
        assert "mcore_rl-environments" not in {thread.name for thread in threading.enumerate()}
        assert gate.turns == (3 if outlived == "finish" else 2)


@pytest.fixture
def zero(fresh_url: str, dir_a: Path) -> str:
    call(RolloutClient(fresh_url), lambda client: load_from_disk(client, dir_a, "0"))
    return fresh_url


def trained(sample: Sample) -> list[tuple[str, int]]:
    """(version, tokens) of what step 3 trains."""
    (bounded,) = without_stale_tokens(Group("p@1", (sample,)), 3 - 1 - BOUND).samples
    return [(s.version, s.end - s.start) for part in bounded.segments for s in part.versions]


def test_a_rollout_that_outlives_the_bound_is_dropped_cut_or_finished(
    zero: str, dir_a: Path, dir_b: Path
) -> None:
    begun = time.monotonic()
    discarded, sample = play(zero, [dir_a, dir_b], "drop")
    assert (dict(discarded), sample) == ({"p@1": "unfinished"}, None)
    call(RolloutClient(zero), lambda client: load_from_disk(client, dir_a, "0"))

    discarded, sample = play(zero, [dir_a, dir_b], "cut")
    assert (dict(discarded), sample is not None) == ({}, True)
    assert sample is not None
    assert (sample.finish_reason, sample.reward) == ("length", 0.0)
    assert [span.version for span in sample.segments[0].versions] == ["0", "1"]
    assert trained(sample) == [("1", NEW)]
    call(RolloutClient(zero), lambda client: load_from_disk(client, dir_a, "0"))

    discarded, sample = play(zero, [dir_a, dir_b], "finish")
    assert sample is not None
    assert sample.reward == 1.0
    assert [span.version for span in sample.segments[0].versions] == ["0", "1", "2"]
    assert trained(sample) == [("1", NEW), ("2", NEW)]
    assert time.monotonic() - begun < 120
