"""A short run of every algorithm on the tiny task, one seed: none collapses, and a control of rate 0 stays.

    python -m benchmarks.learn_algorithms [NAME ...] [--steps 60] [--runs runs/learn] [--out benchmarks]

Each begins with the warm start of benchmarks/learn.py and takes the settings of examples/grpo_tiny.toml, or
of examples/ppo_tiny.toml where it trains a critic; a loss without a ratio has one update for a rollout. They
share a server, one after another, and their ranks are forked, so that what they cost is training; a rollout
is a quarter of the examples'. ECHO, which learns what lies between turns, trains where the right answer is
told between them (benchmarks/told.py), and beside it GRPO in the same place, `grpo-told`. A run collapsed
where its held-out accuracy, sampled or greedy, or the reward of its last ten steps is below COLLAPSED of what
it began with; the control's greedy accuracy stays as it was, to the last answer. One that finished under RUNS
with the same settings is not run again.
Writes OUT/learn_algorithms_DATE.json, anew after every run, with the rows of other algorithms that the newest
one in OUT has, where it is of the same benchmark; the exit code is 1 where one of this call collapsed, or the
control moved.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.learn import ACCURACY, ROOT, RUN_SECONDS, warm_start
from benchmarks.outputs import output_directory
from benchmarks.told import TOKENS, TURNS, told
from mcore_rl.algo import losses
from mcore_rl.algo.algorithms import ALGORITHMS, configure, has_critic
from mcore_rl.directories import write_whole
from mcore_rl.log import read_metrics
from mcore_rl.rollout.processes import Embedded, LocalServer
from tests.e2e.ranks import Ranks, imported

COLLAPSED = 0.7
"""of the start: less at the end is a collapse"""
CONTROL, TOLD = "control", "grpo-told"
PROBLEMS = 500
"""held-out ones, sampled at the start and at the end; all thousand are answered greedily"""
PROMPTS = 16
"""of a step, eight samples each"""
RATE = 2e-4
"""learning rate of the policy: less than the examples', whose steps have four times the samples"""
RATES = {"hybrid-grpo-shared": 2e-5}
"""of those that do not bear RATE: all samples of a prompt have one advantage there, so that an update is
mostly noise, and Adam makes as long a step of it as of a signal"""
PARAMS = {"vapo": "{ length_factor = 5.0 }"}
"""lambda 0.95 for a response of four tokens; the paper's 0.05, meant for thousands, makes it 0"""
START_SECONDS = 600.0
"""of the server, on a machine that others use too"""


@dataclass(frozen=True)
class Learned:
    """What became of a run."""

    accuracy: tuple[float, float]
    """of held-out problems, sampled, at the start and at the end"""
    greedy: tuple[float, float]
    """of all of them, the likeliest answers"""
    reward: tuple[float, float]
    """mean of the first ten steps, and of the last ten"""

    def verdict(self, name: str) -> str:
        """`ok`, or what went wrong."""
        if name == CONTROL:
            return "ok" if self.greedy[0] == self.greedy[1] else "moved"
        pairs = (self.accuracy, self.greedy, self.reward)
        return "ok" if all(end >= COLLAPSED * start for start, end in pairs) else "collapsed"


def learn(name: str, runs: Path, steps: int, url: str, ranks: Ranks) -> Learned:
    """A run by `name`; by GRPO for `grpo-told`, and with learning rate 0 for the control."""
    run = runs / f"algorithm_{name}"
    algorithm = "grpo" if name in (CONTROL, TOLD) else name
    example = ROOT / "examples" / ("ppo_tiny.toml" if has_critic(algorithm) else "grpo_tiny.toml")
    flags: dict[str, object] = {
        "model.path": warm_start(runs, 0),
        "data.train": runs / "data" / "train.jsonl",
        "data.eval": runs / "data" / "eval.jsonl",
        "algorithm.name": algorithm,
        "parallel.tensor": 1,
        "rollout.urls": json.dumps([url]),
        "rollout.prompts_per_step": PROMPTS,
        "run.dir": run,
        "run.seed": 0,
        "optimizer.lr": 0.0 if name == CONTROL else RATES.get(name, RATE),
        "train.steps": steps,
        "train.eval_every": 0,
        "train.eval_samples": PROBLEMS,
    }
    if configure(algorithm).loss is losses.reinforce:  # which has no ratio, and is right in one update alone
        flags |= {"algorithm.mini_batches": 1}
    if configure(algorithm).observation_nll or name == TOLD:
        flags |= {"environment.function": f"{told.__module__}:{told.__name__}"}
        flags |= {"environment.max_turns": TURNS, "environment.max_tokens": TOKENS}
        flags |= {"data.max_prompt_tokens": 16}  # of the tokens that the environment has room for
    if has_critic(algorithm) and algorithm != "ppo":  # whose example has some
        flags |= {"algorithm.params": PARAMS.get(name, "{}")}
    given = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    settings, finished = "\n".join([example.read_text(), *given]).replace(url, ""), run / "finished.txt"
    if not finished.exists() or finished.read_text() != settings:
        shutil.rmtree(run, ignore_errors=True)
        done = ranks.run("train", str(example), *given)
        if done.returncode:
            raise RuntimeError(f"{name}: exit code {done.returncode}: {done.stderr[-2000:]}")
        finished.write_text(settings)
    records = read_metrics(run / "metrics.jsonl")
    accuracy = [record[ACCURACY] for record in records if ACCURACY in record]
    rewards = [record["reward/mean"] for record in records if record["step"]]
    data = runs / "data" / "eval.jsonl"
    return Learned(
        (accuracy[0], accuracy[-1]),
        (greedy(warm_start(runs, 0), data), greedy(run / "weights" / str(steps), data)),
        (fmean(rewards[:10]), fmean(rewards[-10:])),
    )


@functools.cache
@torch.no_grad()
def greedy(path: Path, data: Path) -> float:
    """The share of the problems in `data` that the model's likeliest answer solves, by transformers alone."""
    problems = [json.loads(line) for line in data.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    of_length: dict[int, list[tuple[list[int], str]]] = {}
    for problem in problems:
        ids = tokenizer(problem["prompt"])["input_ids"]
        of_length.setdefault(len(ids), []).append((ids, problem["label"]))
    right = 0
    for length, its in of_length.items():
        asked = torch.tensor([ids for ids, _ in its])
        answers = model.generate(
            asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=8
        )
        texts = tokenizer.batch_decode(answers[:, length:], skip_special_tokens=True)
        right += sum(text == label for text, (_, label) in zip(texts, its, strict=True))
    return right / len(problems)


def main() -> int:
    """Run them, print a line each, and write the curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="algorithms or presets; default: every algorithm"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learn")
    parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
    a = parser.parse_args()
    names = [*(a.names or [*ALGORITHMS, TOLD]), CONTROL]
    model, found = warm_start(a.runs, 0), {}
    with (
        TemporaryDirectory(prefix="mcore_rl_learn_") as scratch,
        LocalServer(
            model, Embedded(threads=1), log_file=Path(scratch) / "server.log", start_timeout=START_SECONDS
        ) as server,
        imported(Path(scratch), {"OMP_NUM_THREADS": "1"}, RUN_SECONDS) as ranks,
    ):
        for name in names:
            found[name] = learn(name, a.runs, a.steps, server.url, ranks)
            print(line_of(name, found[name]), flush=True)
            write(a.out, a.steps, found)
    return 0 if all(one.verdict(name) == "ok" for name, one in found.items()) else 1


def line_of(name: str, one: Learned) -> str:
    """A line of the page's table."""
    numbers = (f"{number:.3f}" for pair in (one.accuracy, one.greedy, one.reward) for number in pair)
    return f"| {name} | {' | '.join(numbers)} | {one.verdict(name)} |"


def write(out: Path, steps: int, found: Mapping[str, Learned]) -> None:
    """What is known so far, in OUT/learn_algorithms_DATE.json."""
    today = datetime.date.today().isoformat()
    benchmark = f"{steps} steps of each algorithm, {PROMPTS} prompts a step, {PROBLEMS} problems sampled"
    newest = max(out.glob("learn_algorithms_*.json"), default=None)
    before = json.loads(newest.read_text()) if newest else {}
    others = before.get("runs", {}) if before.get("benchmark") == benchmark else {}
    rows = {name: {**asdict(one), "verdict": one.verdict(name)} for name, one in found.items()}
    record = {
        "benchmark": benchmark,
        "date": today,
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "runs": others | rows,
    }
    write_whole(out / f"learn_algorithms_{today}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
