"""Real SGLang servers on CPU, started once for the session, and the proof that no process is left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from mcore_rl.rollout.processes import LocalServer, SGLang
from tests.rollout.support import build_model, build_moe_model, http, save_model

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"

TWO_RANKS = ("SGLANG_CPU_OMP_THREADS_BIND", "0|1" if len(os.sched_getaffinity(0)) > 1 else "0|0")
"""variable and value: the cores of each rank, without which SGLang wants a memory node for each"""
KEY, KEY_ENV = "canary-key-of-the-sglang-tests", "MCORE_RL_SGLANG_TEST_KEY"

ON_CPU = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-overlap-schedule", "--disable-cuda-graph", "--sleep-on-idle"),
    *("--max-total-tokens", "8192", "--max-running-requests", "16", "--mem-fraction-static", "0.3"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.sglang)
            item.add_marker(pytest.mark.timeout(600))


def sglang_server(model_dir: Path, log_file: Path, *options: str, key: str | None = None) -> LocalServer:
    """Not started. A start is mostly imports: 20 s alone on a machine, minutes on a busy one."""
    program = SGLang(PYTHON, dtype="float32", api_key_env=key, options=(*ON_CPU, *options))
    return LocalServer(model_dir, program, log_file=log_file, start_timeout=400.0)


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """The variable that servers and clients are told the name of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_ENV, KEY)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_orphans() -> Iterator[None]:
    """Every process of .venv-sglang that these tests started, directly or not, has ended when they have."""
    assert PYTHON.exists(), f"{PYTHON} is missing: run `make sglang-cpu`"
    before = {*processes_of_sglang(), *daemons_of_torch()}
    yield
    left = {*processes_of_sglang(), *daemons_of_torch()} - before
    psutil.wait_procs([psutil.Process(pid) for pid in left], timeout=20)
    assert not {*processes_of_sglang(), *daemons_of_torch()} - before


def daemons_of_torch() -> list[int]:
    """Which a server starts to open shared memory, and which end with it."""
    processes = psutil.process_iter(["cmdline"])
    return [p.pid for p in processes if (p.info["cmdline"] or [""])[0] == "torch_shm_manager"]


def processes_of_sglang() -> list[int]:
    """Living processes that run under .venv-sglang; SGLang renames its children, the files stay open."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        ours = str(PYTHON.parent.parent) in " ".join(process.info["cmdline"] or [])
        renamed = (process.info["cmdline"] or [""])[0].startswith("sglang::")
        if (
            (ours or renamed)
            and process.info["status"] != psutil.STATUS_ZOMBIE
            and "pytest" not in (process.info["cmdline"] or [""])[-1]
        ):
            found.append(process.pid)
    return found


@pytest.fixture(scope="session")
def moe_dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Qwen3-MoE with two sets of weights."""
    root = tmp_path_factory.mktemp("moe")
    first, second = (save_model(root / str(seed), build_moe_model(seed)) for seed in (0, 1))
    return first, second


@pytest.fixture(scope="session")
def dense_dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny dense Qwen3 with two sets of weights."""
    root = tmp_path_factory.mktemp("dense")
    first, second = (save_model(root / str(seed), build_model(seed, spread=0.15)) for seed in (0, 1))
    return first, second


@pytest.fixture(scope="session")
def moe_server(
    moe_dirs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    """A server as for the recordings, from surroundings that ask for log-probs before the temperature (hazard
    1) and are those of a rank under torchrun, in which SGLang would wait for ever for torchrun's store."""
    log_file = tmp_path_factory.mktemp("moe_server") / "log"
    server = sglang_server(moe_dirs[0], log_file, "--enable-return-routed-experts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
        patch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        server.launch()
    try:
        server.wait()
        yield server
        server.check()
    finally:
        server.close()


@pytest.fixture
def moe_url(moe_server: LocalServer, moe_dirs: tuple[Path, Path]) -> Iterator[str]:
    """The server, put back afterwards: its first weights as version `default`, nothing running."""
    yield moe_server.url
    put_back(moe_server.url, moe_dirs[0])


@pytest.fixture(scope="session")
def dense_server(
    dense_dirs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    """A dense model, behind a key."""
    log_file = tmp_path_factory.mktemp("dense_server") / "log"
    with sglang_server(dense_dirs[0], log_file, key=KEY_ENV) as server:
        yield server


@pytest.fixture(scope="session")
def other_dense_server(
    dense_dirs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    """A dense_server with tensor parallelism 2; tests may end it and start it again."""
    log_file = tmp_path_factory.mktemp("other_dense_server") / "log"
    server = sglang_server(dense_dirs[0], log_file, "--tp", "2", key=KEY_ENV)
    with two_ranks():
        server.start()
    try:
        yield server
    finally:
        server.close()


@contextmanager
def two_ranks() -> Iterator[None]:
    """Servers of tensor parallelism 2 start on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*TWO_RANKS)
        yield


@pytest.fixture
def dense_url(dense_server: LocalServer, dense_dirs: tuple[Path, Path]) -> Iterator[str]:
    """A server of moe_url's kind."""
    yield dense_server.url
    put_back(dense_server.url, dense_dirs[0])


def put_back(url: str, model_dir: Path) -> None:
    """Serving `model_dir` as version `default`, nothing running, not paused; with or without a key."""
    assert http(url, "/abort_request", {"abort_all": True}, key=KEY).status == 200
    assert http(url, "/continue_generation", {}, key=KEY).status == 200
    update = {"model_path": str(model_dir), "weight_version": "default"}
    assert http(url, "/update_weights_from_disk", update, key=KEY).status == 200
