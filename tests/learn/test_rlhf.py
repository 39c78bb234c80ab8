"""From data to an aligned model, tiny: its data, the committed figures; with `make test-learn` the runs."""

from __future__ import annotations

import json
import subprocess

import pytest

from benchmarks.rlhf import COMPARED, STAGES, record_of, run_compared, summary
from examples.rlhf_tiny.judge import true_score
from examples.rlhf_tiny.task import CLEAR, files
from mcore_rl.config import load_config
from tests.sources import ROOT

KL_TARGET = 2.0


def check(found: dict[str, float]) -> None:
    """What aligning on the tiny task has to come to, and what it must not without learning."""
    assert found["reward_model_accuracy"] >= 0.9
    assert found["ppo_gain"] >= 0.2
    assert found["dpo_gain"] >= 0.2
    assert abs(found["ppo_control_gain"]) < 0.05
    assert abs(found["dpo_control_gain"]) < 0.05
    assert found["ppo_kl_over_target"] == pytest.approx(1.0, abs=0.2)
    assert abs(found["ppo_fixed_kl_over_target"] - 1.0) > 0.2, "it is the adaptation that holds the target"
    assert found["hybrid_gain"] >= 0.2


def test_the_judge_decides_the_pairs_and_no_held_out_prompt_is_trained_on() -> None:
    made = dict(files(seed=0))
    for name in ("pairs.jsonl", "pairs.eval.jsonl"):
        scores = [
            (true_score(r["prompt"], r["chosen"]), true_score(r["prompt"], r["rejected"])) for r in made[name]
        ]
        assert min(chosen - rejected for chosen, rejected in scores) >= CLEAR
    train, held_out = ({row["prompt"] for row in made[f"sft{part}.jsonl"]} for part in ("", ".eval"))
    assert not train & held_out
    assert held_out == {row["prompt"] for row in made["pairs.eval.jsonl"]}
    assert true_score("4718=", "4718=0") == pytest.approx(4 / 6), "the equals sign is no digit of the prompt"
    assert true_score("4718=", "") == 0.0


def test_the_committed_figures_are_of_these_configs_and_hold() -> None:
    (*_, path) = sorted((ROOT / "benchmarks").glob("rlhf_*.json"))
    committed = json.loads(path.read_text())
    check(committed["summary"])
    assert summary(committed["runs"], KL_TARGET) == committed["summary"]
    for stage in STAGES:
        config = load_config(ROOT / "examples" / "rlhf_tiny" / f"{stage}.toml")
        known = committed["runs"][stage]["settings"]
        assert known["train"]["steps"] == config.train.steps, "measured anew: python -m benchmarks.rlhf"
        assert known["optimizer"]["lr"] == config.optimizer.lr


@pytest.mark.learn
@pytest.mark.timeout(4 * 3600)
def test_all_stages_again() -> None:
    runs = ROOT / "runs" / "rlhf"
    subprocess.run(["make", "rlhf"], cwd=ROOT, check=True)
    run_compared(runs)
    assert (runs / "index.html").exists()
    check(summary({name: record_of(runs / name) for name in (*STAGES, *COMPARED)}, KL_TARGET))
