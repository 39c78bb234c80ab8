"""What `make demo-sglang` runs, trainer at TP=2, with two real servers: one is killed, then all are."""

from __future__ import annotations

import json
import os
import subprocess
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mcore_rl.errors import EXIT_RETRYABLE
from mcore_rl.log import read_metrics
from tests.e2e.conftest import ENVIRONMENT, ROOT, Task, command, task  # noqa: F401 a fixture
from tests.sglang.conftest import PYTHON


@pytest.mark.parametrize("transport", ["disk", "distributed", "adapter"])
def test_one_killed_server_costs_no_sample_and_all_killed_end_the_run(
    task: Task,  # noqa: F811
    transport: str,
    tmp_path: Path,
) -> None:
    log, events = tmp_path / "log", tmp_path / "events.jsonl"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command(*arguments(task, tmp_path), "--publish.transport", transport, *adapters(transport)),
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=out,
            stderr=out,
        )

    def wait_for(happened: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not happened():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)

    try:
        wait_for(lambda: b"step 1/" in log.read_bytes(), 400)
        first, _ = servers(process.pid)
        first.kill()
        wait_for(lambda: b"server_returned" in events.read_bytes(), 400)
        so_far = log.read_bytes().count(b"step ")
        wait_for(lambda: log.read_bytes().count(b"step ") > so_far, 100)  # the next step samples
        family = psutil.Process(process.pid).children(recursive=True)
        for server in servers(process.pid):
            server.kill()
        assert process.wait(timeout=60) == EXIT_RETRYABLE, log.read_text()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
    steps = read_metrics(tmp_path / "metrics.jsonl")
    check(steps, read_metrics(events))
    step = steps[-1]["step"]
    last = {"disk": {str(step)}, "distributed": {"initial"}, "adapter": {str(step - 1), str(step)}}[transport]
    assert {version.name for version in (tmp_path / "weights").iterdir() if version.is_dir()} == last


def arguments(task: Task, directory: Path) -> list[str]:  # noqa: F811
    pairs = zip(task.rl[::2], task.rl[1::2], strict=True)
    flags = [flag for pair in pairs if "threads" not in pair[0] for flag in pair]
    flags += ["--run.dir", str(directory), "--train.steps", "1000"]
    flags += ["--rollout.python", str(PYTHON), "--rollout.servers", "2"]
    return ["train", "examples/gspo_sglang_tiny.toml", *flags]


def adapters(transport: str) -> list[str]:
    """What a run that publishes adapters alone has besides."""
    if transport != "adapter":
        return []
    options = [*tomllib.loads((ROOT / "examples/gspo_sglang_tiny.toml").read_text())["rollout"]["options"]]
    options += ["--lora-backend", "torch_native"]
    lora = ["--lora.rank", "8", "--lora.alpha", "16", "--optimizer.lr", "2e-3"]
    return [*lora, "--rollout.options", json.dumps(options)]


def servers(trainer: int) -> list[psutil.Process]:
    """The servers that the trainer started; not what they started themselves."""
    family = psutil.Process(trainer).children(recursive=True)
    return [p for p in family if "sglang.launch_server" in p.cmdline()]


def check(steps: list[dict], events: list[dict]) -> None:
    trained = steps[1:]
    assert {step["samples"] for step in trained} == {8 * 8}
    assert max(step["publish/probe_max_abs"] for step in steps) <= 2e-4
    moved = [step for step in trained if step["grad_norm"] > 0]  # equal rewards leave the first weights
    assert moved
    assert min(step["publish/stale_max_abs"] for step in moved) > 2e-4
    assert min(step["rollout/servers"] for step in steps) == 1, "the fault did not fire"
    kinds = [event["kind"] for event in events]
    assert kinds.index("server_lost") < kinds.index("server_returned")
    error = next(event for event in events if event["kind"] == "error")
    assert (error["type"], events[-1]["exit_code"]) == ("RolloutError", EXIT_RETRYABLE)
    assert "no rollout server is left" in error["message"]
