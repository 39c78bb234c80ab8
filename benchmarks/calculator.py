"""The calculator example, with the tool and with the tool disabled, from one warm start.

    python benchmarks/calculator.py [--runs runs/calculator_benchmark] [--out benchmarks]

Trains examples/calculator_sft.toml, then examples/calculator_tiny.toml twice, the second time without a tool
to call. A run that finished under RUNS is not run again. Writes OUT/calculator_DATE.json (held-out accuracy
by step, seconds from the start to the end of every run, hardware) and a picture beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.outputs import output_directory
from mcore_rl.log import read_metrics
from mcore_rl.report.picture import picture
from mcore_rl.report.svg import Line

ROOT = Path(__file__).parents[1]
ACCURACY = "eval/eval/accuracy"
RUN_SECONDS = 3600.0


def command(*arguments: str) -> None:
    """Run one of the project's commands from the project's root; its errors end this script."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, timeout=RUN_SECONDS)


def seconds_of(run: Path) -> float | None:
    """From the start of a run to its end; None where it has not ended well."""
    path = run / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    ended = [event["time"] for event in events if event["kind"] == "end" and event["exit_code"] == 0]
    return ended[-1] - events[0]["time"] if ended else None


def trained(run: Path, example: str, *flags: str) -> Path:
    """The directory of a run of that example, which is made unless it has ended well."""
    if seconds_of(run) is None:
        shutil.rmtree(run, ignore_errors=True)
        command("-m", "mcore_rl", "train", f"examples/{example}.toml", "--run.dir", str(run), *flags)
    return run


def curve(run: Path) -> dict[str, Any]:
    """What a run with held-out problems came to."""
    records = read_metrics(run / "metrics.jsonl")
    evaluated = [record for record in records if ACCURACY in record]
    return {
        "steps": [record["step"] for record in evaluated],
        "accuracy": [record[ACCURACY] for record in evaluated],
        "low": [record[f"{ACCURACY}/low"] for record in evaluated],
        "high": [record[f"{ACCURACY}/high"] for record in evaluated],
        "reward": [record["reward/mean"] for record in records if "reward/mean" in record],
        "turns": [record["environment/turns"] for record in records if "environment/turns" in record],
        "mismatch_p999": max(record.get("mismatch/p999", 0.0) for record in records),
        "void": sum(record.get("void", 0.0) for record in records),
        "seconds": seconds_of(run),
    }


def measure(runs: Path) -> dict[str, Any]:
    """The record of all three runs."""
    data = runs / "data"
    if not (data / "eval.jsonl").exists():
        command("examples/calculator.py", str(data))
    flags = ("--model.path", str(data / "model"), "--data.train", str(data / "demonstrations.jsonl"))
    warm = trained(runs / "warm_start", "calculator_sft", *flags)
    flags = ("--model.path", str(warm / "model"), "--data.train", str(data / "train.jsonl"))
    flags += ("--data.eval", str(data / "eval.jsonl"), "--rollout.threads", "1")
    with_tool = trained(runs / "with_tool", "calculator_tiny", *flags)
    none = ("--environment.args.tools", "[]")
    without = trained(runs / "without_tool", "calculator_tiny", *flags, *none)
    return {
        "benchmark": "held-out accuracy of examples/calculator_tiny.toml, 200 problems at temperature 1",
        "date": datetime.date.today().isoformat(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "warm_start_seconds": seconds_of(warm),
        "with_tool": curve(with_tool),
        "without_tool": curve(without),
        "config": (ROOT / "examples/calculator_tiny.toml").read_text(),
    }


def main() -> None:
    """Run what is missing, and write the curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "calculator_benchmark")
    parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
    a = parser.parse_args()
    record = measure(a.runs.absolute())
    path = a.out / f"calculator_{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        Line(name, list(zip(record[key]["steps"], record[key]["accuracy"], strict=True)), color=color)
        for color, (key, name) in enumerate((("with_tool", "calculator"), ("without_tool", "tool disabled")))
    ]
    path.with_suffix(".svg").write_text(picture("calculator: accuracy on held-out products", lines))
    print(path)


if __name__ == "__main__":
    main()
