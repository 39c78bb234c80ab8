"""Tiny models on disk, one embedded server for the session, and the proof that no process is left behind.

A plugin of tests/conftest.py: tests/rollout and tests/server share the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from transformers import PreTrainedModel

from mcore_rl.rollout.processes import Embedded, LocalServer
from tests.rollout.support import build_model, put_back, save_model

HERE = Path(__file__).parent
SHARED_BY = (HERE / "rollout", HERE / "server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.is_relative_to(room) for room in SHARED_BY):  # one worker owns the session's server
            item.add_marker(pytest.mark.xdist_group("rollout"))


@pytest.fixture(scope="session", autouse=True)
def no_orphans() -> Iterator[None]:
    """Every server started by these tests has ended when they have."""
    yield
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if _is_ours(p)]
    assert left == [], f"servers left behind: {left}"


def _is_ours(process: psutil.Process) -> bool:
    command = process.info["cmdline"] or []
    return "mcore_rl.server" in command and process.ppid() in (1, psutil.Process().pid)


@pytest.fixture(scope="session")
def model_a() -> PreTrainedModel:
    return build_model(0)


@pytest.fixture(scope="session")
def model_b() -> PreTrainedModel:
    return build_model(1)


@pytest.fixture(scope="session")
def dir_a(tmp_path_factory: pytest.TempPathFactory, model_a: PreTrainedModel) -> Path:
    return save_model(tmp_path_factory.mktemp("model_a"), model_a)


@pytest.fixture(scope="session")
def dir_b(tmp_path_factory: pytest.TempPathFactory, model_b: PreTrainedModel) -> Path:
    return save_model(tmp_path_factory.mktemp("model_b"), model_b)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, dir_a: Path) -> Iterator[LocalServer]:
    """Serves model_a; a test that changes its weights or pauses it takes `fresh_url` instead of the url."""
    log_file = tmp_path_factory.mktemp("server") / "server.log"
    with LocalServer(dir_a, Embedded(threads=1), log_file=log_file) as running:
        yield running
        running.check()


@pytest.fixture
def url(server: LocalServer) -> str:
    return server.url


@pytest.fixture
def fresh_url(server: LocalServer, dir_a: Path) -> Iterator[str]:
    """The server, put back afterwards: model_a as version `default`, nothing running, not paused."""
    yield server.url
    put_back(server.url, dir_a)
