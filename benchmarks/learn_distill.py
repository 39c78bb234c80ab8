"""Held-out divergence of a small student from a larger teacher while it is distilled.

    python -m benchmarks.learn_distill [--kinds forward reverse sampled] [--steps 80] [--out benchmarks]
        [--runs runs/learn_distill]

The teacher, a Qwen3 of 2 layers and hidden size 128, learns sums of two digits by supervised training; its
students have hidden size 64 and random weights. They are distilled by the forward and by the reverse KL, on
rows and (`sampled`) on what they sample themselves, each beside a control with a learning rate of 0, through
`mcore-rl train`. Writes OUT/learn_distill_KINDS_DATE.json, the divergence per step, and a picture
beside it; exits with 1 where a divergence is not halved, or moves without a learning rate.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.learn import ROOT, command
from benchmarks.outputs import output_directory
from mcore_rl.log import read_metrics
from mcore_rl.report.picture import picture
from mcore_rl.report.svg import Line

KINDS = ("forward", "reverse", "sampled")
MOST = 0.5
"""share of the first divergence that may be left"""


@dataclass(frozen=True)
class Curve:
    """The divergence of one run, in nats per token."""

    divergence: str
    control: bool
    """learning rate 0"""
    steps: list[int]
    nats: list[float]
    """held out; of what was sampled, the step's own samples"""


def task(runs: Path, hidden: int) -> Path:
    """A directory with problems and a model of so many channels, whose weights are random."""
    made = runs / f"task_{hidden}"
    if not (made / "eval.jsonl").exists():
        sizes = ("--layers", "2", "--hidden", str(hidden), "--train", "4000", "--eval", "300")
        command("examples/arithmetic.py", str(made), *sizes)
    return made


def teacher(runs: Path) -> Path:
    """The model of a supervised run."""
    made = runs / "teacher"
    if not (made / "model").exists():
        data = task(runs, 128)
        flags = {"run.dir": made, "model.path": data / "model", "data.train": data / "train.jsonl"}
        flags |= {"parallel.tensor": 1, "train.steps": 160}
        command("-m", "mcore_rl", "train", "examples/sft_tiny.toml", *_flags(flags))
    return made / "model"


def distill(divergence: str, runs: Path, steps: int, *, control: bool) -> Curve:
    """One run from the random student."""
    run, data = runs / f"{divergence}{'_control' if control else ''}", task(runs, 64)
    flags: dict[str, object] = {
        "run.dir": run,
        "train.steps": steps,
        "optimizer.lr": 0.0 if control else 2e-3,
    }
    flags |= {"distill.divergence": divergence, "model.path": data / "model"}
    flags |= {"distill.teachers": f'{{large = "{teacher(runs)}"}}', "data.train": data / "train.jsonl"}
    if divergence == "sampled":
        flags |= {
            "distill.on_policy": "true",
            "rollout.prompts_per_step": 64,
            "rollout.samples_per_prompt": 4,
        }
        flags |= {"rollout.max_new_tokens": 6, "rollout.threads": 1, "data.max_prompt_tokens": 8}
    else:
        flags |= {"data.validation": data / "eval.jsonl", "supervised.batch_size": 64}
        flags |= {"train.eval_every": max(1, steps // 8), "train.eval_samples": 200}
    command("-m", "mcore_rl", "train", "examples/distill_tiny.toml", *_flags(flags))
    name = "loss/policy" if divergence == "sampled" else "validation/loss"
    known = [record for record in read_metrics(run / "metrics.jsonl") if name in record]
    return Curve(divergence, control, [r["step"] for r in known], [r[name] for r in known])


def _flags(values: Mapping[str, object]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def wrong(curves: list[Curve]) -> list[str]:
    """What does not hold, in words."""
    found = []
    for curve in curves:
        first, last = curve.nats[0], curve.nats[-1]
        if curve.control and abs(last - first) > 0.1 * first:
            found.append(f"{curve.divergence}: {first:.3f} becomes {last:.3f} without a learning rate")
        if not curve.control and not last <= MOST * first:
            found.append(f"{curve.divergence}: {first:.3f} becomes {last:.3f} only")
    return found


def main() -> int:
    """Run every kind and its control, and write the curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--control-steps", type=int, default=8)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learn_distill")
    parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
    a = parser.parse_args()
    curves = [distill(kind, a.runs, a.steps, control=False) for kind in a.kinds]
    curves += [distill(kind, a.runs, a.control_steps, control=True) for kind in a.kinds]
    write(curves, a.out)
    failed = wrong(curves)
    print("\n".join(failed) or "every divergence is halved", file=sys.stderr)
    return 1 if failed else 0


def write(curves: list[Curve], out: Path) -> None:
    """The json and the picture."""
    today = datetime.date.today().isoformat()
    record = {
        "benchmark": "divergence of a student from its teacher, nats per token",
        "date": today,
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "curves": [asdict(curve) for curve in curves],
    }
    kinds = dict.fromkeys(curve.divergence for curve in curves)
    path = out / f"learn_distill_{'_'.join(kinds)}_{today}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        Line(one.divergence, list(zip(one.steps, one.nats, strict=True)), color=color, faint=one.control)
        for color, one in ((KINDS.index(one.divergence), one) for one in curves)
    ]
    path.with_suffix(".svg").write_text(
        picture("distill: nats from the teacher", lines, faint="learning rate 0")
    )


if __name__ == "__main__":
    sys.exit(main())
