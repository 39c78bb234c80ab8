"""Publishing what changed, to a real server: it has the trainer's weights, of which few bytes travelled."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mcore_rl.config import load_config, notes
from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import ConfigError, WeightSyncError
from mcore_rl.model.build import build_policy
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.rollout.processes import Embedded, LocalServer
from mcore_rl.rollout.reply import ANY_VOCABULARY
from mcore_rl.training.model_passes import log_probs
from mcore_rl.weights.disk import Changes
from mcore_rl.weights.follow import states
from mcore_rl.weights.transport import server_log_probs
from tests.model.support import at_layout, shape_at
from tests.rollout.proxy import proxy_beside, status
from tests.sources import ROOT

SEQUENCES = [np.random.default_rng(i).integers(32, size=12 + i).tolist() for i in range(4)]


@pytest.fixture(scope="module")
def server(dense_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """It takes the weights of whatever trainer publishes to it."""
    log = tmp_path_factory.mktemp("server") / "log"
    with LocalServer(dense_dir, Embedded(threads=1), log_file=log) as started:
        yield started.url


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """The directory of a trainer, and a follower that keeps its replica in `local` beside it."""
    directory = tmp_path / "shared"
    directory.mkdir()
    command = [sys.executable, "-m", "mcore_rl", "follow", str(directory), str(tmp_path / "local")]
    with (tmp_path / "follow.log").open("wb") as log:
        follower = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while not states(directory):
            assert time.monotonic() < end, (tmp_path / "follow.log").read_text()
            time.sleep(0.1)
        yield directory
    finally:
        follower.terminate()
        follower.wait(timeout=30)


def published(mesh: Mesh, source: Path, url: str, shared: Path) -> list[tuple[int, float, float]]:
    """(bytes of the version, largest |Megatron - server|, and of the weights before) of three publishes."""
    model = build_policy(source, mesh)
    fleet = Fleet([url], vocabulary=ANY_VOCABULARY, timeout=60.0)
    transport = Changes(shared, shared.parent / "local", timeout=60.0)
    scored = [TokenSequence(tokens[:1], tokens[1:]) for tokens in SEQUENCES]

    def served(tag: str) -> np.ndarray:
        scores, failed = on_main(mesh, lambda: server_log_probs(fleet.serving, SEQUENCES, tag))
        assert not failed
        return np.concatenate(scores[url])

    seen = []
    for number in range(3):
        if number:
            change_a_little(model.unwrapped)
        stale = served(f"{number}-before")
        assert transport.publish(model, fleet, str(number)) == {}
        held = np.concatenate(log_probs(model, scored, shape_at(mesh, 64), 1.0))
        fresh = served(f"{number}-after")
        size = sum(path.stat().st_size for path in (shared / str(number)).glob("*.safetensors*"))
        seen.append((size, float(np.abs(held - fresh).max()), float(np.abs(held - stale).max())))
        assert len([path for path in shared.iterdir() if path.name.isdigit()]) == 1  # older ones are gone
    return seen


def change_a_little(chunks) -> None:
    """Every 50th weight of each matrix, as a step in bf16 changes few."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.view(-1)[::50] += 0.25


@pytest.mark.slow
def test_the_server_holds_what_the_trainer_has(pool2, dense_dir, server, shared):
    """Two pipeline stages write a file each."""
    first, *later = at_layout(pool2, "pp2", published, dense_dir, server, shared)[0]
    assert first[1] < 2e-4
    for size, fresh, stale in later:
        assert size < 0.1 * first[0]
        assert fresh < 2e-4
        assert stale > 1e-2, "the check cannot see stale weights"


def beside_one_without_a_copy(mesh: Mesh, source: Path, url: str, shared: Path) -> dict[str, str]:
    """Why the second server is lost; the next version reaches both."""
    model = build_policy(source, mesh)
    transport = Changes(shared, shared.parent / "local", timeout=60.0)
    with proxy_beside(url, status(400), path="/update_weights_from_disk") as way:
        fleet = Fleet([url, way.url], vocabulary=ANY_VOCABULARY, timeout=60.0)
        failed = transport.publish(model, fleet, "1")
        fleet.lose(failed)
        assert [client.url for client in fleet.serving] == [url]
        assert transport.publish(model, fleet, "2") == {}
        assert len(fleet.serving) == 2
        return {"it" if way.url == lost else lost: why for lost, why in failed.items()}


@pytest.mark.slow
def test_a_server_without_a_copy_is_lost_alone_until_it_has_one(pool1, dense_dir, server, shared):
    (failed,) = at_layout(pool1, "tp1", beside_one_without_a_copy, dense_dir, server, shared)
    assert failed.keys() == {"it"}
    assert "`mcore-rl follow` must run there" in failed["it"]


def without_follower(mesh: Mesh, source: Path, url: str, shared: Path) -> str:
    model = build_policy(source, mesh)
    transport = Changes(shared, shared / "local", timeout=0.5)
    with pytest.raises(WeightSyncError) as error:
        transport.publish(model, Fleet([url], vocabulary=ANY_VOCABULARY, timeout=5.0), "1")
    return str(error.value)


def test_without_a_follower_every_rank_is_told(pool2, dense_dir, tmp_path):
    said = at_layout(pool2, "tp2", without_follower, dense_dir, "http://127.0.0.1:9", tmp_path)
    assert len(said) == 2
    assert all("start `mcore-rl follow" in message for message in said)


def test_it_needs_servers_that_run_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").touch()
    keys = [f"--{k}=x" for k in ("run.dir", "model.path", "data.train")] + ["--train.steps=5"]
    keys += ["--publish.replica=/local"]
    with pytest.raises(ConfigError, match=r"publish\.replica: .* set rollout\.urls"):
        load_config(tmp_path / "empty.toml", keys)
    urls = '--rollout.urls=["http://127.0.0.1:1"]'
    assert load_config(tmp_path / "empty.toml", [*keys, urls]).publish.replica == Path("/local")
    (note,) = notes(load_config(tmp_path / "empty.toml", [*keys, urls, "--publish.transport=tensor"]))
    assert note.startswith("publish.replica: has no effect")
