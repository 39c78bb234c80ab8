"""The engine thread: errors reach those who wait, and commands keep their order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import PreTrainedModel

from mcore_rl.server.engine import Engine
from mcore_rl.server.kv_cache import build_cache
from mcore_rl.server.schema import RequestError
from mcore_rl.server.sequence import Limits, Sequence
from mcore_rl.server.worker import Worker
from tests.rollout.support import DEADLINE, VOCAB, wait_until


@pytest.fixture
def worker(model_a: PreTrainedModel) -> Iterator[Worker]:
    worker = Worker(Engine(model_a, build_cache(model_a, 4096), max_running=8))
    yield worker
    worker.close(DEADLINE)


def request(rid: str, *, tokens: int = 4, prompt: tuple[int, ...] = (1, 2, 3)) -> Sequence:
    return Sequence(rid, rid, list(prompt), Limits(tokens, 0, 1.0, 1.0, 0.0, 0, frozenset()), seed=1)


def test_a_failed_forward_costs_the_requests_in_flight_and_not_the_server(worker: Worker) -> None:
    long = worker.generate([request("long", tokens=400)])
    wait_until(lambda: bool(worker.call(lambda engine: engine.running).result(DEADLINE)), "it decodes")
    impossible = worker.generate([request("impossible", prompt=(1, VOCAB + 5, 2))])
    for future in (long, impossible):
        with pytest.raises(IndexError):
            future.result(DEADLINE)
    assert len(worker.generate([request("long")]).result(DEADLINE)[0].output_ids) == 4


def test_a_failed_command_reaches_its_caller_alone(worker: Worker) -> None:
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda _: 1 // 0).result(DEADLINE)
    assert worker.call(lambda _: 1).result(DEADLINE) == 1


def test_a_rid_is_free_again_when_its_request_has_ended(worker: Worker) -> None:
    first = worker.generate([request("a", tokens=300)])
    with pytest.raises(RequestError, match="'a' is already in flight"):
        worker.generate([request("b"), request("a")]).result(DEADLINE)
    assert worker.abort(lambda s: s.rid == "a").result(DEADLINE) == 1
    assert first.result(DEADLINE)[0].finish_reason is not None
    assert worker.generate([request("b"), request("a")]).result(DEADLINE)


def test_a_quiet_command_waits_for_running_requests_and_goes_before_waiting_ones(worker: Worker) -> None:
    running = worker.generate([request("running", tokens=200)])
    wait_until(lambda: bool(worker.call(lambda engine: engine.running).result(DEADLINE)), "it decodes")
    seen = worker.call(lambda engine: (running.done(), len(engine.running), len(engine.waiting)), quiet=True)
    later = worker.generate([request("later")])
    assert seen.result(DEADLINE) == (True, 0, 1)
    assert len(later.result(DEADLINE)[0].output_ids) == 4


def test_close_cancels_what_is_in_flight(worker: Worker) -> None:
    future = worker.generate([request("a", tokens=400)])
    worker.close(DEADLINE)
    assert future.cancelled()
