"""Both Megatron-Core versions compute the same losses: of every layout, and of every step of a short demo."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from mcore_rl.log import read_metrics
from mcore_rl.verify.layouts.case import SMALL

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = {"0.16.1": ".venv", "0.19.2": ".venv-lane"}
"""megatron-core -> where make puts it"""
TOLERANCE = 1e-6
DEADLINE = 400.0
MISSING = [name for name in ENVIRONMENTS.values() if not (ROOT / name / "bin" / "python").exists()]

pytestmark = [
    pytest.mark.lanes,
    pytest.mark.xdist_group("lanes"),
    pytest.mark.timeout(4 * DEADLINE),
    pytest.mark.skipif(bool(MISSING), reason=f"make setup setup-lane has not made {MISSING}"),
]


def python(environment: str, *arguments: str) -> None:
    """Run to its end in one of the two environments."""
    done = subprocess.run(
        [str(ROOT / environment / "bin" / "python"), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def differences(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """What both measured -> |difference|, where it is above the tolerance."""
    assert one.keys() == other.keys()
    return {
        name: abs(one[name] - other[name]) for name in one if not abs(one[name] - other[name]) <= TOLERANCE
    }


def test_a_difference_is_seen() -> None:
    assert differences({"tp2 gspo": 0.25, "pp2 gspo": 0.5}, {"tp2 gspo": 0.25, "pp2 gspo": 0.500002})


def test_layouts(tmp_path: Path) -> None:
    measured = {}
    for version, environment in ENVIRONMENTS.items():
        file = tmp_path / f"{version}.json"
        python(environment, "-m", "tests.lanes.measured", ",".join(("tp1", *SMALL)), "ppo,gspo", str(file))
        answer = json.loads(file.read_text())
        assert answer["version"] == version
        measured[version] = answer["losses"]
    assert differences(*measured.values()) == {}


TRAIN = ("-m", "mcore_rl", "train")


def demo(environment: str, data: Path, directory: Path) -> dict[str, float]:
    """`run step` -> loss of a few steps of what `make demo` runs."""
    problems = ["--data.train", f"{data}/train.jsonl"]
    warm = ["--model.path", f"{data}/model", "--run.dir", f"{directory}/sft", "--train.steps", "160"]
    python(environment, *TRAIN, "examples/sft_tiny.toml", *problems, *warm)
    problems += ["--data.eval", f"{data}/eval.jsonl", "--train.eval_samples", "50"]
    rl = ["--model.path", f"{directory}/sft/model", "--run.dir", f"{directory}/rl", "--train.steps", "2"]
    rl += ["--optimizer.warmup_steps", "0", "--train.eval_every", "0"]
    rl += ["--rollout.prompts_per_step", "16", "--rollout.threads", "1"]
    python(environment, *TRAIN, "examples/gspo_tiny.toml", *problems, *rl)
    return {
        f"{run} {step['step']}": step["loss/policy"]
        for run in ("sft", "rl")
        for step in read_metrics(directory / run / "metrics.jsonl")
        if "loss/policy" in step
    }


def test_the_demo(tmp_path: Path) -> None:
    data = tmp_path / "data"
    python(ENVIRONMENTS["0.16.1"], "examples/arithmetic.py", str(data), "--seed", "0")
    older, newer = (demo(place, data, tmp_path / version) for version, place in ENVIRONMENTS.items())
    assert len(older) == 160 + 2
    assert all(newer.values())  # rewards that are all equal would train nothing, and agree
    assert differences(older, newer) == {}
