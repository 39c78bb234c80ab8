"""A server that is stopped or killed in mid-publish is lost alone, and comes back by the same transport."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from mcore_rl.errors import ConfigError, WeightSyncError
from mcore_rl.model.build import build_policy
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.rollout.client import RolloutClient
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.rollout.processes import Embedded, LocalServer
from mcore_rl.weights.transport import server_log_probs
from tests.model.support import at_layout
from tests.rollout.proxy import Fault, cut, proxy_beside, status
from tests.rollout.support import (
    VOCAB,
    build_model,
    build_moe_model,
    http,
    largest_error,
    log_probs_of,
    wait_until,
)
from tests.sglang.conftest import KEY_ENV, put_back, two_ranks
from tests.sglang.test_publish import transport_of

SILENCE_SECONDS = 20.0
TOKENS = [5, 9, 200, 17, 3, 44, 8, 101]
UPDATES = {"tensor": "/update_weights_from_tensor", "distributed": "/update_weights_from_distributed"}


def check_serves(urls: Sequence[str], want: list[float]) -> None:
    scores, failed = server_log_probs(
        [RolloutClient(url, api_key_env=KEY_ENV) for url in urls], [TOKENS], "x"
    )
    assert not failed
    assert all(largest_error(scores[url][0], want) < 2e-5 for url in urls), scores


def weights(seed: int) -> list[float]:
    return log_probs_of(build_model(seed, spread=0.15), TOKENS[:1], TOKENS[1:])


def strike(
    mesh: Mesh, dirs: tuple[Path, Path], urls: tuple[str, str], name: str, session: int, number: int
) -> float:
    """Seconds of a publish of the second weights, the first server being hit at its second bucket.

    With two copies of the model the first one has no server left then.
    """
    models = [build_policy(directory, mesh) for directory in dirs]
    struck, kept = urls
    transport = transport_of(name, Path())
    calls = []

    def main(work: Callable[[], object]) -> None:
        on_main(mesh, lambda: work() and None)

    def hit() -> None:
        calls.append(0)
        if len(calls) == 2:
            os.killpg(session, number)

    def publish(way: str) -> float:
        fleet = Fleet([way, kept], vocabulary=VOCAB, api_key_env=KEY_ENV, timeout=SILENCE_SECONDS)
        began = time.monotonic()
        failed = transport.publish(models[1], fleet, "2")
        seconds = time.monotonic() - began
        assert list(failed) == [way]
        fleet.lose(failed)
        main(lambda: check_serves([kept], weights(1)))
        if number == signal.SIGSTOP:
            main(lambda: os.killpg(session, signal.SIGCONT))
            main(lambda: wait_until(lambda: bool(fleet.returning()), "it answers again", 60))
            assert len(fleet.serving) == 1, "it serves before it was published to"
            assert transport.publish(models[0], fleet, "3") == {}
            assert len(fleet.serving) == 2
            main(lambda: check_serves([way, kept], weights(0)))
        transport.close(fleet)
        return seconds

    with ExitStack() as stack:
        way = proxy_beside(struck, path=UPDATES[name], on_arrival=hit)
        return publish(on_main(mesh, lambda: stack.enter_context(way).url))


@pytest.fixture
def servers(
    dense_url: str, other_dense_server: LocalServer, dense_dirs: tuple[Path, Path]
) -> Iterator[tuple[LocalServer, str]]:
    """One to hit, and one to keep."""
    yield other_dense_server, dense_url
    put_back(other_dense_server.url, dense_dirs[0])


@pytest.mark.parametrize("transport", sorted(UPDATES))
def test_stopped(
    pool2: Pool, transport: str, servers: tuple[LocalServer, str], dense_dirs: tuple[Path, Path]
) -> None:
    other, kept = servers
    assert other.process is not None
    args = dense_dirs, (other.url, kept), transport, other.process.pid, signal.SIGSTOP
    try:
        seconds = max(at_layout(pool2, "dp2", strike, *args))
    finally:
        os.killpg(other.process.pid, signal.SIGCONT)
    assert seconds < 4 * SILENCE_SECONDS


@pytest.mark.parametrize("transport", sorted(UPDATES))
def test_killed_and_started_anew(
    pool1: Pool, transport: str, servers: tuple[LocalServer, str], dense_dirs: tuple[Path, Path]
) -> None:
    other, kept = servers
    assert other.process is not None
    args = dense_dirs, (other.url, kept), transport, other.process.pid, signal.SIGKILL
    (seconds,) = at_layout(pool1, "tp1", strike, *args)
    assert seconds < 4 * SILENCE_SECONDS
    other.kill()
    other.model_dir = dense_dirs[0]
    with two_ranks():
        other.start()
    check_serves([other.url], weights(0))
    at_layout(pool1, "tp1", take_back, dense_dirs[1], (other.url, kept), transport)


def take_back(mesh: Mesh, source: Path, urls: tuple[str, str], name: str) -> None:
    """A server that was lost has the whole version before it serves."""
    fleet = Fleet(urls, vocabulary=VOCAB, api_key_env=KEY_ENV, timeout=60.0)
    fleet.lose({urls[0]: "killed"})
    transport = transport_of(name, Path())
    assert transport.publish(build_policy(source, mesh), fleet, "4") == {}
    assert len(fleet.serving) == 2
    check_serves(urls, weights(1))
    transport.close(fleet)


# -- faults on the wire


def through(mesh: Mesh, dirs: tuple[Path, Path], url: str, name: str, path: str, faults: list[Fault]) -> None:
    """A publish through a proxy with this script at `path`."""
    model = build_policy(dirs[1], mesh)
    transport = transport_of(name, Path())
    with proxy_beside(url, *faults, path=path) as way:
        fleet = Fleet([way.url], vocabulary=VOCAB, timeout=30.0)
        assert transport.publish(model, fleet, "4") == {}
        assert not way.script, "the fault did not fire"
        transport.close(fleet)
    scores, _ = server_log_probs([RolloutClient(url)], [TOKENS], "wire")
    want = log_probs_of(build_moe_model(1), TOKENS[:1], TOKENS[1:])
    assert largest_error(scores[url][0], want) < 2e-5


def lost_answers(mesh: Mesh, dirs: tuple[Path, Path], url: str) -> None:
    """Every call of the tensor transport may be made twice; of the other, those around the broadcasts."""
    around = ["/pause_generation", "/begin_weight_update", "/end_weight_update", "/continue_generation"]
    for path in [*around, UPDATES["tensor"]]:
        through(mesh, dirs, url, "tensor", path, [status(500), cut(0.6)][: 1 + (path in UPDATES.values())])
    for path in around[1:3]:
        through(mesh, dirs, url, "distributed", path, [status(502)])


def test_an_answer_that_is_lost_is_asked_for_again(
    pool1: Pool, moe_url: str, moe_dirs: tuple[Path, Path]
) -> None:
    at_layout(pool1, "tp1", lost_answers, moe_dirs, moe_url)


# -- refusals


def refusals(mesh: Mesh, dirs: tuple[Path, Path], url: str, dead: str) -> None:
    model = build_policy(dirs[1], mesh)
    for name in UPDATES:
        transport = transport_of(name, Path())
        with pytest.raises(WeightSyncError, match="no server has loaded version 5"):
            transport.publish(model, Fleet([dead], vocabulary=VOCAB, timeout=5.0), "5")
    fleet = Fleet([url], vocabulary=VOCAB, timeout=60.0)
    outside = {"serialized_named_tensors": ["AA=="], "load_format": "flattened_bucket"}
    assert http(url, UPDATES["tensor"], outside).status == 400, "hazard 4: nothing is taken outside of one"
    assert http(url, "/begin_weight_update", {}).status == 200  # a trainer that died had opened one
    assert transport_of("tensor", Path()).publish(model, fleet, "5") == {}


def test_a_dead_server_is_an_error_and_an_update_that_was_left_open_is_none(
    pool1: Pool, moe_url: str, moe_dirs: tuple[Path, Path]
) -> None:
    at_layout(pool1, "tp1", refusals, moe_dirs, moe_url, "http://127.0.0.1:9")


def beside_embedded(mesh: Mesh, source: Path, url: str) -> None:
    for name in UPDATES:
        with pytest.raises(ConfigError, match=r'embedded server.*publish\.transport = "disk"'):
            transport_of(name, Path()).publish(
                build_policy(source, mesh), Fleet([url], vocabulary=VOCAB, timeout=20.0), "1"
            )


def test_the_embedded_server_is_refused_and_serves_on(
    pool1: Pool, dense_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    with LocalServer(dense_dirs[0], Embedded(), log_file=tmp_path / "log", start_timeout=400) as server:
        at_layout(pool1, "tp1", beside_embedded, dense_dirs[0], server.url)
        assert http(server.url, "/ready", method="GET").status == 200
