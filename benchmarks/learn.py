"""Learning curves of the tiny examples: several seeds, and a control with learning rate 0.

    python benchmarks/learn.py gspo [--steps 400] [--seeds 0 1 2] [--runs runs/learn] [--out benchmarks]

Each seed has its own warm start (supervised, then reinforcement learning through `mcore-rl train`), and its
own control. As many runs as there are processors go at once, each with tensor parallelism 1: the layouts
compute the same numbers (`mcore-rl verify layouts`). A run that finished under RUNS with the same settings is
not run again, so that a second call goes on where the first was ended. Writes OUT/learn_NAME_DATE.json
(held-out accuracy per step and seed, hardware, settings) and a picture beside it.
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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from benchmarks.outputs import output_directory
from mcore_rl.log import read_metrics
from mcore_rl.report.picture import picture
from mcore_rl.report.svg import Line

ROOT = Path(__file__).parents[1]
ACCURACY = "eval/eval/accuracy"
RUN_SECONDS = 7200.0


@dataclass(frozen=True)
class Curve:
    """Held-out accuracy of one run, sampled at temperature 1 on 1000 problems."""

    seed: int
    control: bool
    """learning rate 0"""
    steps: list[int]
    accuracy: list[float]


def command(*arguments: str) -> None:
    """Run one of the project's commands from the project's root; its errors end this script."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, timeout=RUN_SECONDS)


def warm_start(runs: Path, seed: int) -> Path:
    """The model directory of a supervised warm start with this seed."""
    data, run = runs / "data", runs / f"warm_start_{seed}"
    if not data.exists():
        command("examples/arithmetic.py", str(data), "--seed", "0")
    if not (run / "model").exists():
        flags: dict[str, object] = {"model.path": data / "model", "data.train": data / "train.jsonl"}
        flags |= {"run.dir": run, "run.seed": seed}
        command("-m", "mcore_rl", "train", "examples/sft_tiny.toml", *_flags(flags))
    return run / "model"


def learn(
    name: str,
    runs: Path,
    seed: int,
    steps: int,
    *,
    control: bool = False,
    variant: str = "",
    settings: Mapping[str, object] = MappingProxyType({}),
) -> Curve:
    """One reinforcement-learning run of examples/NAME_tiny.toml and its held-out accuracy.

    Args:
        variant: what the run's directory is called beside NAME and seed, where it has `settings`.
    """
    run = runs / f"{name}{variant}_{seed}{'_control' if control else ''}"
    flags: dict[str, object] = {
        "model.path": warm_start(runs, seed),
        "data.train": runs / "data" / "train.jsonl",
        "data.eval": runs / "data" / "eval.jsonl",
        "parallel.tensor": 1,
        "rollout.threads": 1,
        "run.dir": run,
        "run.seed": seed,
        "train.steps": steps,
        "train.eval_every": max(1, steps // 8),
    }
    flags |= settings
    if control:
        flags |= {"optimizer.lr": 0.0} | ({"critic.lr": 0.0} if name == "ppo" else {})
    example = ROOT / "examples" / f"{name}_tiny.toml"
    asked = "\n".join([example.read_text(), *_flags(flags)])
    finished = run / "finished.txt"
    if not finished.exists() or finished.read_text() != asked:
        shutil.rmtree(run, ignore_errors=True)
        command("-m", "mcore_rl", "train", str(example), *_flags(flags))
        finished.write_text(asked)
    evaluated = [record for record in read_metrics(run / "metrics.jsonl") if ACCURACY in record]
    return Curve(seed, control, [r["step"] for r in evaluated], [r[ACCURACY] for r in evaluated])


def learn_all(name: str, runs: Path, seeds: Sequence[int], steps: int, control_steps: int) -> list[Curve]:
    """A run of every seed and a control of every seed, several at once."""
    for seed in seeds:
        warm_start(runs, seed)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(learn, name, runs, seed, steps) for seed in seeds]
        jobs += [pool.submit(learn, name, runs, seed, control_steps, control=True) for seed in seeds]
        return [job.result() for job in jobs]


def _flags(values: dict[str, object]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def write(name: str, curves: list[Curve], out: Path) -> Path:
    """The json and the picture; returns the json's path."""
    today = datetime.date.today().isoformat()
    record = {
        "benchmark": f"held-out accuracy of examples/{name}_tiny.toml, 1000 problems at temperature 1",
        "date": today,
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "config": (ROOT / "examples" / f"{name}_tiny.toml").read_text(),
        "curves": [asdict(curve) for curve in curves],
    }
    path = out / f"learn_{name}_{today}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".svg").write_text(chart(name, curves))
    return path


def chart(name: str, curves: list[Curve]) -> str:
    """Accuracy over steps: a line per seed, and its control in the same colour."""
    lines = [
        Line(
            f"seed {curve.seed}",
            list(zip(curve.steps, curve.accuracy, strict=True)),
            color=curve.seed,
            faint=curve.control,
        )
        for curve in curves
    ]
    return picture(f"{name}: accuracy on 1000 held-out problems", lines, faint="learning rate 0")


def main() -> None:
    """Run every seed and its control, and write the curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", help="such as gspo: examples/NAME_tiny.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--control-steps", type=int, default=40, help="of the runs with learning rate 0")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learn")
    parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
    a = parser.parse_args()
    print(write(a.name, learn_all(a.name, a.runs, a.seeds, a.steps, a.control_steps), a.out))


if __name__ == "__main__":
    main()
