"""The curve of `make real`: a real chat model's reward and held-out accuracy, step by step.

    python -m benchmarks.real RUN_DIR [--control RUN_DIR] [--name real] [--out benchmarks]

reads what `mcore-rl train examples/real_grpo.toml` left in RUN_DIR, and in that of a control with
`--optimizer.lr 0`. Writes OUT/NAME_DATE.json (accuracy with its 95 % interval, reward, differences of the
engines, seconds by phase, events, settings, hardware) and a picture beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.outputs import output_directory
from mcore_rl.log import read_metrics
from mcore_rl.report.picture import picture
from mcore_rl.report.svg import Line

KEPT = (
    *("eval/sums/accuracy", "eval/sums/accuracy/low", "eval/sums/accuracy/high", "reward/mean", "entropy"),
    *("mismatch/p999", "mismatch/max_abs", "publish/probe_max_abs", "publish/stale_max_abs"),
    *("length/mean", "truncated", "memory/peak_gib"),
)


def record_of(run: Path) -> dict[str, Any]:
    """What is kept of a run."""
    lines = read_metrics(run / "metrics.jsonl")
    phases = {name for line in lines for name in line if name.startswith("time/")}
    settings = tomllib.loads((run / "resolved.toml").read_text())
    return {
        "settings": {name: settings[name] for name in ("model", "rollout", "algorithm", "optimizer", "train")}
        | {"publish": {name: v for name, v in settings["publish"].items() if name.startswith("tolerance")}},
        "events": [event["kind"] for event in read_metrics(run / "events.jsonl")],
        "seconds": {name: round(sum(line.get(name) or 0 for line in lines), 1) for name in sorted(phases)},
        "steps": [
            {"step": line["step"]} | {n: line[n] for n in KEPT if line.get(n) is not None} for line in lines
        ],
    }


def lines_of(record: dict[str, Any], *, control: bool) -> list[Line]:
    """Reward of what is trained on, and accuracy on what is held out."""
    found = []
    for color, (name, label) in enumerate(
        [("reward/mean", "trained sums"), ("eval/sums/accuracy", "held out")]
    ):
        points = [(step["step"], step[name]) for step in record["steps"] if name in step]
        found.append(Line(label, points, color=color, faint=control))
    return found


def main() -> None:
    """Read the runs, and write the json and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--control", type=Path, help="the same with a learning rate of 0")
    parser.add_argument("--name", default="real")
    parser.add_argument("--out", type=output_directory, default=Path(__file__).parent)
    arguments = parser.parse_args()
    today = datetime.date.today().isoformat()
    runs = {"run": record_of(arguments.run)}
    lines = lines_of(runs["run"], control=False)
    if arguments.control:
        runs["control"] = record_of(arguments.control)
        lines += lines_of(runs["control"], control=True)
    hardware = {"machine": platform.machine(), "cpus": os.cpu_count()}
    benchmark = (
        "SmolLM2-135M-Instruct answers sums of two numbers up to 12: the last number of a response is right"
    )
    path = arguments.out / f"{arguments.name}_{today}.json"
    path.write_text(
        json.dumps({"benchmark": benchmark, "date": today, "hardware": hardware, **runs}, indent=1) + "\n"
    )
    title = "SmolLM2-135M-Instruct: right answers to sums"
    path.with_suffix(".svg").write_text(
        picture(title, lines, faint="learning rate 0" if arguments.control else "")
    )
    print(path)


if __name__ == "__main__":
    main()
