"""A task of reasoning-gym and an environment of verifiers, each trained through its one config.

    python -m benchmarks.connectors [--runs runs/connectors_benchmark] [--out benchmarks]

The model is the calculator example's, tiny. Supervised warm starts teach it the form of an answer: on
reasoning-gym's own answers (sums of two digits), and, for the four sums of the tests' taskset, on each of its
four answers for each sum, so that one in four is right. Then examples/reasoning_gym_tiny.toml trains the one,
and examples/verifiers_tiny.toml the other, for which `make verifiers` must have been run. The held-out sums
are of another seed, and many are among those of training. A run
that finished under RUNS is not run again. Writes OUT/connectors_DATE.json and a picture beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.calculator import ROOT, RUN_SECONDS, command, seconds_of, trained
from benchmarks.outputs import output_directory
from mcore_rl.log import read_metrics
from mcore_rl.report.picture import picture
from mcore_rl.report.svg import Line
from tests.environments.test_verifiers import BIN, indexes

TASK = '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'
"""of chain_sum: sums and differences of two digits"""
ENV = '{"taskset": {"id": "sums_taskset"}}'
GYM, VERIFIERS = "reasoning_gym", "verifiers"
ACCURACY = "eval/gym_eval/accuracy"


def gym_data(runs: Path) -> dict[str, Path]:
    """Prompt files of the task, for training and held out."""
    found = {"train": runs / "gym_train.jsonl", "eval": runs / "gym_eval.jsonl"}
    for seed, (path, size) in enumerate(zip(found.values(), (400, 100), strict=True)):
        if not path.exists():
            said = ("chain_sum", str(path), "--size", str(size), "--seed", str(seed), "--config", TASK)
            command("-m", "mcore_rl.environments.connectors.reasoning_gym", *said)
    return found


def warm_start(run: Path, model: Path, data: Path, steps: int) -> Path:
    """A supervised run on the labels of a prompt file."""
    flags = ("--supervised.target", "label", "--train.steps", str(steps), "--data.max_prompt_tokens", "128")
    paths = ("--model.path", str(model), "--data.train", str(data))
    paths += ("--supervised.batch_size", str(min(64, len(data.read_text().splitlines()))))
    return trained(run, "calculator_sft", *paths, *flags)


def verifiers_run(runs: Path, model: Path) -> Path:
    """The run of the package's environment, in the environment where it is installed."""
    data, run = runs / "verifiers.jsonl", runs / VERIFIERS
    answers = runs / "verifiers_answers.jsonl"
    if seconds_of(run) is not None:
        return run
    env = os.environ | indexes()
    path = f"{ROOT}:{ROOT / 'tests' / 'environments'}"
    env |= {"PATH": f"{BIN}:{env['PATH']}", "PYTHONPATH": path}
    write = [BIN / "python", "-m", "mcore_rl.environments.connectors.verifiers", ENV, data]
    subprocess.run(write, cwd=ROOT, env=env, check=True, timeout=RUN_SECONDS)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    guesses = [{**row, "id": f"{row['id']}-{n}", "label": str(n)} for row in rows for n in (4, 6, 8, 10)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in guesses))
    warm = warm_start(runs / "verifiers_warm_start", model, answers, 80)
    model = warm / "model"
    train = [BIN / "python", "-m", "mcore_rl", "train", "examples/verifiers_tiny.toml", "--run.dir", run]
    train += ["--model.path", model, "--model.random_init", "false", "--data.train", data]
    subprocess.run(train, cwd=ROOT, env=env, check=True, timeout=RUN_SECONDS)
    return run


def curve(run: Path) -> dict[str, Any]:
    """Rewards by step, and held-out accuracy where there is any."""
    records = read_metrics(run / "metrics.jsonl")
    steps = [record for record in records if "reward/mean" in record]
    evaluated = [record for record in records if ACCURACY in record]
    return {
        "steps": [record["step"] for record in steps],
        "reward": [round(record["reward/mean"], 4) for record in steps],
        "eval_steps": [record["step"] for record in evaluated],
        "accuracy": [record[ACCURACY] for record in evaluated],
        "mismatch_p999": max(record.get("mismatch/p999", 0.0) for record in records),
        "void": sum(record.get("void", 0.0) for record in records),
        "seconds": seconds_of(run),
    }


def measure(runs: Path) -> dict[str, Any]:
    """The record of all runs."""
    model = runs / "data" / "model"
    if not model.exists():
        command("examples/calculator.py", str(runs / "data"))
    data = gym_data(runs)
    warm = warm_start(runs / "warm_start", model, data["train"], 150)
    flags = ("--model.path", str(warm / "model"), "--model.random_init", "false", "--train.eval_every", "10")
    flags += ("--data.train", str(data["train"]), "--data.eval", str(data["eval"]))
    gym = trained(runs / GYM, "reasoning_gym_tiny", *flags)
    found = {GYM: curve(gym)}
    if BIN.exists():
        found[VERIFIERS] = curve(verifiers_run(runs, model))
    return {
        "benchmark": "rewards of one config each: sums of reasoning-gym, and a taskset of verifiers",
        "date": datetime.date.today().isoformat(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "reasoning-gym": version("reasoning-gym"),
        **found,
    }


def main() -> None:
    """Run what is missing, and write the curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "connectors_benchmark")
    parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
    a = parser.parse_args()
    record = measure(a.runs.absolute())
    path = a.out / f"connectors_{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        Line(name, list(zip(record[name]["steps"], record[name]["reward"], strict=True)), color=color)
        for color, name in enumerate((GYM, VERIFIERS))
        if name in record
    ]
    path.with_suffix(".svg").write_text(picture("connectors: mean reward of a step", lines))
    print(path)


if __name__ == "__main__":
    main()
