"""GRPO on the real model with its embedded server, two short steps: the engines agree, nothing is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_rl.log import read_metrics
from mcore_rl.precision import tolerances
from tests.launched import ENVIRONMENT

ROOT = Path(__file__).parents[2]
LAYERS = 30
"""of SmolLM2-135M"""
SMALL = {
    "train.steps": 2,
    "rollout.prompts_per_step": 2,
    "rollout.samples_per_prompt": 4,
    "rollout.threads": 1,
    "rollout.dump": 0,
    "rollout.start_timeout": 300,
    "publish.probe_sequences": 4,
    "eval.sets": "{}",
    "train.eval_every": 0,
    "reward.function": "tests.e2e.rewards:by_label",
}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def run(request: pytest.FixtureRequest, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that has ended well."""
    directory = tmp_path_factory.mktemp("real") / request.param
    flags = {**SMALL, "run.dir": directory, "model.path": made / "model", "data.train": made / "train.jsonl"}
    flags["model.precision"] = request.param
    options = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "mcore_rl", "train", "examples/real_grpo.toml", *options]
    subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, check=True, timeout=600)
    return directory


@pytest.fixture(scope="module")
def steps(run: Path) -> list[dict]:
    return read_metrics(run / "metrics.jsonl")


def test_server_and_trainer_agree_within_the_limits_of_their_precision(run: Path, steps: list[dict]) -> None:
    assert [step["step"] for step in steps] == [0, 1, 2]
    limit = tolerances(run.name, LAYERS)
    assert max(step["mismatch/p999"] for step in steps[1:]) <= limit.p999
    assert max(step["publish/probe_max_abs"] for step in steps) <= limit.largest


def test_a_healthy_run_has_no_mismatch_event(run: Path) -> None:
    kinds = {event["kind"] for event in read_metrics(run / "events.jsonl")}
    assert kinds <= {"start", "end"}, kinds


def test_the_weights_of_the_step_before_are_seen_in_float32(run: Path, steps: list[dict]) -> None:
    """Negative control. Below float32 rounding hides a step; there, that the server's own log-probs moved."""
    name = "publish/moved_max_abs" if run.name == "bf16" else "publish/stale_max_abs"
    least = 0 if run.name == "bf16" else tolerances("fp32", LAYERS).largest
    assert min(step[name] for step in steps[1:] if step["grad_norm"] > 0) > least
