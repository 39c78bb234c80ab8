"""A short run of what `make demo-sglang` runs: trainer at TP=2, two real servers, one of them killed."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import psutil

from mcore_rl.metrics import read_metrics
from tests.e2e.conftest import ENVIRONMENT, ROOT, Task, command, task  # noqa: F401 a fixture
from tests.sglang.conftest import PYTHON

STEPS = 40


def test_gspo_learns_from_real_servers_one_of_which_is_killed(task: Task, tmp_path: Path) -> None:  # noqa: F811
    flags = [
        flag
        for pair in zip(task.rl[::2], task.rl[1::2], strict=True)
        if "threads" not in pair[0]
        for flag in pair
    ]
    arguments = ["train", "examples/gspo_sglang_tiny.toml", *flags, "--run.dir", str(tmp_path)]
    arguments += ["--rollout.python", str(PYTHON), "--rollout.servers", "2", "--train.steps", str(STEPS)]
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command(*arguments), cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=out, stderr=out
        )
    try:
        wait_for_step_1(log, process)
        first = next(c for c in psutil.Process(process.pid).children(recursive=True) if is_server(c))
        first.kill()
        assert process.wait(timeout=400) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
    check(read_metrics(tmp_path / "metrics.jsonl"), read_metrics(tmp_path / "events.jsonl"))


def is_server(process: psutil.Process) -> bool:
    return "sglang.launch_server" in process.cmdline()


def wait_for_step_1(log: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 500
    while b"step 1/" not in log.read_bytes():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.2)


def check(steps: list[dict], events: list[dict]) -> None:
    trained = steps[1:]
    assert [step["samples"] for step in trained] == [16 * 8] * STEPS
    assert max(step["publish/probe_max_abs"] for step in steps) <= 2e-4
    assert min(step["publish/stale_max_abs"] for step in trained) > 2e-4
    assert min(step["rollout/servers"] for step in steps) == 1
    assert "server_lost" in [event["kind"] for event in events]
