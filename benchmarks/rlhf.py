"""What `make rlhf` comes to: the hidden true score before and after PPO and DPO, and the controls.

    python -m benchmarks.rlhf RUNS [--out benchmarks]

reads what `make rlhf` left in RUNS (runs/rlhf). With --run it runs first what is compared with it: PPO and
DPO with a learning rate of 0, PPO with a fixed coefficient of the KL, and both readings of Hybrid GRPO.
Writes OUT/rlhf_DATE.json (scores with their 95 % intervals, accuracy of the reward model, KL, seconds by
stage, settings, hardware) and a picture beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.outputs import output_directory
from mcore_rl.log import read_metrics
from mcore_rl.report.picture import picture
from mcore_rl.report.svg import Line, Reference

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "rlhf_tiny"
TRUTH = "eval/truth/accuracy"
SHORT = ("--train.steps", "10", "--train.eval_every", "0")
COMPARED: Mapping[str, tuple[str, Sequence[str]]] = {
    "ppo_control": ("ppo", ("--optimizer.lr", "0", "--critic.lr", "0", *SHORT)),
    "dpo_control": ("dpo", ("--optimizer.lr", "0", *SHORT)),
    "ppo_fixed": ("ppo", ("--algorithm.params", "{ kl_in_reward = 0.1 }", "--train.eval_every", "0")),
    "hybrid": ("hybrid", ()),
    "hybrid_shared": (
        "hybrid",
        ("--algorithm.name", "hybrid-grpo-shared", "--algorithm.params", "{ kl_in_loss = 0.5 }"),
    ),
}
"""run -> its config and what is other in it"""
STAGES = ("sft", "reward_model", "ppo", "dpo")
KEPT = (
    *(TRUTH, f"{TRUTH}/low", f"{TRUTH}/high", "validation/accuracy", "validation/confidence", "reward/mean"),
    *("kl/response", "kl/coefficient", "value/explained_variance", "entropy", "length/mean"),
)
LAST = 15
"""steps over which the KL is held against its target"""


def run_compared(runs: Path) -> None:
    """Train what `make rlhf` does not."""
    for name, (config, flags) in COMPARED.items():
        path = EXAMPLES / f"{config}.toml"
        command = [
            sys.executable,
            "-m",
            "mcore_rl",
            "train",
            str(path),
            "--run.dir",
            str(runs / name),
            *flags,
        ]
        subprocess.run(command, cwd=ROOT, check=True, timeout=3600)


def record_of(run: Path) -> dict[str, Any]:
    """What is kept of a run."""
    lines = read_metrics(run / "metrics.jsonl")
    settings = tomllib.loads((run / "resolved.toml").read_text())
    sections = ("parallel", "rollout", "algorithm", "optimizer", "critic", "train", "supervised")
    steps = [{"step": line["step"]} | {n: line[n] for n in KEPT if line.get(n) is not None} for line in lines]
    return {
        "seconds": round(sum(line.get("time/step") or 0 for line in lines), 1),
        "settings": {name: settings[name] for name in sections if name in settings},
        "steps": [step for step in steps if len(step) > 1],
    }


def scores_of(record: Mapping[str, Any]) -> list[float]:
    """The hidden true scores of a run, first to last."""
    return [step[TRUTH] for step in record["steps"] if TRUTH in step]


def summary(records: Mapping[str, Any], target: float) -> dict[str, float]:
    """The figures that the documents quote."""
    accuracy = [
        s["validation/accuracy"] for s in records["reward_model"]["steps"] if "validation/accuracy" in s
    ]
    found = {"reward_model_accuracy": accuracy[-1]}
    for name in records:
        if scores := scores_of(records[name]):
            found |= {f"{name}_before": scores[0], f"{name}_after": scores[-1]}
            found[f"{name}_gain"] = scores[-1] / scores[0] - 1
        kl = [step["kl/response"] for step in records[name]["steps"] if "kl/response" in step]
        if kl:
            found[f"{name}_kl_over_target"] = statistics.fmean(kl[-LAST:]) / target
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    """Read the runs, and write the json and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--run", action="store_true", help="train first what is compared")
    parser.add_argument("--out", type=output_directory, default=Path(__file__).parent)
    arguments = parser.parse_args()
    if arguments.run:
        run_compared(arguments.runs)
    names = [*STAGES, *COMPARED]
    records = {name: record_of(arguments.runs / name) for name in names}
    today = datetime.date.today().isoformat()
    target = records["ppo"]["settings"]["algorithm"]["params"]["kl_target"]
    found = {
        "benchmark": "the tiny RLHF task: hidden true score of 300 held-out prompts, at temperature 1",
        "date": today,
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "summary": summary(records, target),
        "runs": records,
    }
    path = arguments.out / f"rlhf_{today}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        Line(
            label,
            [(s["step"], s["kl/response"]) for s in records[name]["steps"] if "kl/response" in s],
            color,
        )
        for color, (name, label) in enumerate([("ppo", "adaptive"), ("ppo_fixed", "fixed at 0.1")])
    ]
    title = "PPO on the tiny task: KL to the SFT policy, nats per response"
    path.with_suffix(".svg").write_text(picture(title, lines, references=[Reference("target", target)]))
    print(path)
    print(json.dumps(found["summary"], indent=1))


if __name__ == "__main__":
    main()
