"""A short run of what `make demo` runs: every part real, at TP=2."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import psutil
import pytest

from mcore_rl.log import NON_FINITE, read_metrics
from mcore_rl.metric_names import meaning_of
from mcore_rl.report import write_report
from tests.e2e.conftest import STEPS, Task

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def steps(demo: Path) -> list[dict]:
    return read_metrics(demo / "metrics.jsonl")


def test_every_step_is_logged_with_held_out_accuracy_at_both_ends(steps):
    assert [step["step"] for step in steps] == list(range(STEPS + 1))
    assert "eval/eval/accuracy" in steps[0]
    assert "eval/eval/accuracy" in steps[-1]
    assert all(step["samples"] == 8 * 8 for step in steps[1:])


def test_every_metric_is_explained(steps, task: Task):
    supervised = read_metrics(task.root / "warm_start" / "metrics.jsonl")
    names = {name for step in [*steps, *supervised] for name in step} - {"step", NON_FINITE}
    assert [name for name in sorted(names) if meaning_of(name) is None] == []
    assert {"lr/policy", "throughput/tokens_per_second", "memory/peak_gib"} <= names
    assert steps[-1]["throughput/mfu"] is None, "a CPU has no peak that anybody compares with"


def test_servers_and_megatron_agree_on_every_sampled_token(steps):
    assert max(step["mismatch/max_abs"] for step in steps[1:]) <= 2e-4
    assert max(step["mismatch/p999"] for step in steps[1:]) <= 2e-5
    assert max(step["publish/probe_max_abs"] for step in steps[1:]) <= 2e-4


def test_the_previous_weights_would_have_been_noticed(steps):
    """Negative control of the agreement: the same comparison with the weights before the update."""
    for name in ("stale", "moved"):
        assert min(step[f"publish/{name}_max_abs"] for step in steps[1:]) > 2e-4


def test_ratios_leave_1_and_clipping_acts(steps):
    assert all(step["ratio/min"] < 1 < step["ratio/max"] for step in steps[1:])
    assert max(step["clip/fraction"] for step in steps[1:]) > 0


def test_run_directory_is_complete(demo: Path):
    resolved = tomllib.loads((demo / "resolved.toml").read_text())
    assert resolved["parallel"]["tensor"] == 2
    assert resolved["train"]["steps"] == STEPS
    events = read_metrics(demo / "events.jsonl")
    assert events[-1]["kind"] == "end"
    assert events[-1]["exit_code"] == 0
    assert [path.name for path in (demo / "weights").iterdir() if path.is_dir()] == [str(STEPS)]
    sample = json.loads((demo / "samples" / "step_1.jsonl").read_text().splitlines()[0])
    assert sample.keys() == {"step", "prompt", "response", "label", "reward"}
    page = write_report([demo]).read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_no_process_is_left(demo: Path):
    def mine(process: psutil.Process) -> bool:
        return str(demo) in " ".join(process.info["cmdline"] or [])

    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if mine(p) and p.pid != os.getpid()]
