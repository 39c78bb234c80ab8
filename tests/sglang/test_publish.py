"""After a publish from any trainer layout (dp2 is TP1, twice) a real server's log-probs are Megatron's."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from mcore_rl.data.packing import TokenSequence
from mcore_rl.model.build import build_policy
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.rollout.processes import LocalServer
from mcore_rl.rollout.reply import ANY_VOCABULARY
from mcore_rl.training.model_passes import log_probs
from mcore_rl.weights.broadcast import Distributed
from mcore_rl.weights.disk import Disk
from mcore_rl.weights.shared import SharedTensor
from mcore_rl.weights.transport import Transport, server_log_probs
from tests.model.support import at_layout, shape_at
from tests.rollout.support import VOCAB
from tests.sglang.conftest import (
    KEY_ENV,
    daemons_of_torch,
    processes_of_sglang,
    put_back,
    sglang_server,
    two_ranks,
)

P999, LARGEST = 2e-5, 2e-4
SEQUENCES = [
    [*np.random.default_rng(i).integers(VOCAB, size=24 + 4 * i).tolist(), VOCAB - 1, 1] for i in range(16)
]
"""[24-84 tokens + 2] each with the vocabulary's last id, which SGLang echoes as 0"""
TRANSPORTS = ["disk", "tensor", "distributed"]
BUCKET = 30_000
"""bytes: several buckets for an owner"""


def transport_of(name: str, directory: Path) -> Transport:
    kinds = {"tensor": SharedTensor, "distributed": Distributed}
    return kinds[name](BUCKET) if name in kinds else Disk(directory)


def published(
    mesh: Mesh, source: Path, urls: Sequence[str], directory: Path, version: str, name: str
) -> tuple[Tensor, Tensor]:
    """[servers tokens] |Megatron - server| after publishing `source` from this layout, and before."""
    model = build_policy(source, mesh)
    fleet = Fleet(urls, vocabulary=ANY_VOCABULARY, api_key_env=KEY_ENV, timeout=60.0)

    def served(tag: str) -> Tensor:
        scores, failed = on_main(mesh, lambda: server_log_probs(fleet.serving, SEQUENCES, tag))
        assert not failed
        rows = [[value for row in scores[url] for value in row] for url in urls]
        return torch.tensor(rows, dtype=torch.float64)

    stale = served(f"{version}-stale")
    transport = transport_of(name, directory)
    assert transport.publish(model, fleet, version) == {}
    transport.close(fleet)
    scored = [TokenSequence(tokens[:1], tokens[1:]) for tokens in SEQUENCES]
    held = torch.from_numpy(np.concatenate(log_probs(model, scored, shape_at(mesh, 256), 1.0))).double()
    return (held - served(f"{version}-fresh")).abs(), (held - stale).abs()


@pytest.fixture
def pool(request: pytest.FixtureRequest, layout: str) -> Pool:
    """A pool of as many processes as the layout has ranks."""
    return request.getfixturevalue(f"pool{Layout.parse(layout).world_size}")


def check(
    pool: Pool, layout: str, source: Path, urls: Sequence[str], directory: Path, transport: str
) -> None:
    args = source, urls, directory, f"{layout}-{transport}", transport
    fresh, stale = at_layout(pool, layout, published, *args)[0]
    for of_server, of_stale in zip(fresh, stale, strict=True):
        assert len(of_server) > 800
        assert of_server.quantile(0.999) <= P999
        assert of_server.max() <= LARGEST
        assert of_stale.max() > LARGEST, "the check cannot see stale weights"
        assert of_stale.quantile(0.5) > P999


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", ["dp2", "tp2", "tp2pp2"])
def test_dense(
    pool: Pool,
    layout: str,
    transport: str,
    dense_urls: list[str],
    dense_dirs: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    check(pool, layout, dense_dirs[1], dense_urls, tmp_path, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", ["dp2", "ep2", "tp2ep2", "tp2pp2ep2"])
def test_mixture_of_experts(
    pool: Pool,
    layout: str,
    transport: str,
    moe_urls: list[str],
    moe_dirs: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    check(pool, layout, moe_dirs[1], moe_urls, tmp_path, transport)


@pytest.fixture(scope="module")
def other_moe_server(
    moe_dirs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    """A server of tensor parallelism 2."""
    log_file = tmp_path_factory.mktemp("other_moe_server") / "log"
    server = sglang_server(moe_dirs[0], log_file, "--tp", "2")
    with two_ranks():
        server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def moe_urls(moe_url: str, other_moe_server: LocalServer, moe_dirs: tuple[Path, Path]) -> Iterator[list[str]]:
    """The same as dense_urls, of the mixture of experts."""
    yield [moe_url, other_moe_server.url]
    put_back(other_moe_server.url, moe_dirs[0])


@pytest.fixture
def dense_urls(
    dense_url: str, other_dense_server: LocalServer, dense_dirs: tuple[Path, Path]
) -> Iterator[list[str]]:
    """Servers of tensor parallelism 1 and 2."""
    yield [dense_url, other_dense_server.url]
    put_back(other_dense_server.url, dense_dirs[0])


def publish_often(
    mesh: Mesh, source: Path, urls: Sequence[str], directory: Path, name: str
) -> tuple[Holdings, Holdings]:
    """What trainer and servers hold after 5 publishes, and after 20 more."""
    model = build_policy(source, mesh)
    fleet = Fleet(urls, vocabulary=ANY_VOCABULARY, api_key_env=KEY_ENV, timeout=60.0)
    transport = transport_of(name, directory)
    seen = []
    for number in range(1, 26):
        assert transport.publish(model, fleet, str(number)) == {}
        if number in (5, 25):
            seen.append(on_main(mesh, lambda: holdings_left(directory, seen)))
    transport.close(fleet)
    return seen[0], seen[1]


def holdings_left(directory: Path, before: Sequence[Holdings]) -> Holdings:
    """Holdings; where there were some `before`, once there is no more, or after 10 s.

    A connection that was closed takes a moment to go; what leaks, stays.
    """
    deadline = time.monotonic() + 10
    found = holdings(directory)
    while before and leaked(before[0], found) and time.monotonic() < deadline:
        time.sleep(0.5)
        found = holdings(directory)
    return found


def holdings(directory: Path) -> Holdings:
    """Bytes of this process, of all servers' processes, and of the disk."""
    processes = [psutil.Process(), *map(psutil.Process, [*processes_of_sglang(), *daemons_of_torch()])]
    return Holdings(
        processes=len(processes),
        files=sum(process.num_fds() for process in processes),
        threads=sum(process.num_threads() for process in processes),
        mebibytes=sum(process.memory_info().rss for process in processes) / 2**20,
        on_disk=len(list(directory.rglob("*.safetensors"))),
        in_memory=len(list(Path("/dev/shm").glob("*mcore_rl_*"))),
    )


@dataclass(frozen=True)
class Holdings:
    """Counts, and resident memory."""

    processes: int
    files: int
    threads: int
    mebibytes: float
    on_disk: int
    in_memory: int


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_20_publishes_leak_nothing(
    pool2: Pool, transport: str, dense_urls: list[str], dense_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    args = dense_dirs[1], dense_urls, tmp_path / "weights", transport
    before, after = at_layout(pool2, "tp2", publish_often, *args)[0]
    print(before, after)
    assert before.processes > 6
    assert after.on_disk == (transport == "disk")
    assert leaked(before, after) == []


def test_the_comparison_sees_one_file_left_open(tmp_path: Path) -> None:
    before = holdings(tmp_path)
    with (tmp_path / "left_open").open("w"):
        assert leaked(before, holdings(tmp_path)) == ["files"]


def leaked(before: Holdings, after: Holdings) -> list[str]:
    """What there is more of; memory breathes, by far less than 20 copies of the weights in 7 processes."""
    grown = [f.name for f in fields(before) if getattr(after, f.name) > getattr(before, f.name)]
    return [name for name in grown if name != "mebibytes" or after.mebibytes - before.mebibytes > 16]
