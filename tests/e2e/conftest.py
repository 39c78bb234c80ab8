"""A small task and a briefly trained model for whole runs of the command."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.arithmetic import main as write_arithmetic
from tests.e2e.ranks import Ranks
from tests.launched import DEADLINE, ENVIRONMENT

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Task:
    """Directories of the generated problems, and flags that point a config at them."""

    root: Path

    @property
    def data(self) -> list[str]:
        """Overrides for [data]."""
        return ["--data.train", f"{self.root}/data/train.jsonl"]

    @property
    def rl(self) -> list[str]:
        """Overrides for a short GSPO run from the warm start."""
        return [
            *self.data,
            *("--data.eval", f"{self.root}/data/eval.jsonl", "--train.eval_samples", "32"),
            *("--model.path", f"{self.root}/warm_start/model", "--train.eval_every", "0"),
            *("--rollout.prompts_per_step", "8", "--rollout.threads", "1", "--optimizer.warmup_steps", "0"),
        ]


def without_threads(arguments: list[str]) -> list[str]:
    """Servers given by url have no threads to set: the key would be refused."""
    at = arguments.index("--rollout.threads")
    return arguments[:at] + arguments[at + 2 :]


def command(*arguments: str) -> list[str]:
    """The `mcore-rl` command line."""
    return [sys.executable, "-m", "mcore_rl", *arguments]


def run(*arguments: str, deadline: float = DEADLINE) -> subprocess.CompletedProcess[str]:
    """Run `mcore-rl` to its end."""
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=deadline,
        check=False,
    )


def warm_start(task: Task, directory: Path, *flags: str) -> list[str]:
    """A supervised run of 40 steps at TP=2, which saves after 20 and 40."""
    steps = ["--train.steps", "40", "--checkpoint.every", "20"]
    model = ["--model.path", f"{task.root}/data/model"]
    return [
        "train",
        "examples/sft_tiny.toml",
        *task.data,
        *model,
        "--run.dir",
        str(directory),
        *steps,
        *flags,
    ]


@pytest.fixture(scope="session")
def task(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The arithmetic problems and a policy after 40 supervised steps at TP=2."""
    made = Task(tmp_path_factory.mktemp("task"))
    assert write_arithmetic([f"{made.root}/data", "--seed", "0"]) == 0
    done = ranks.run(*warm_start(made, made.root / "warm_start"), world=2)
    assert done.returncode == 0, done.stderr
    return made


STEPS = 6


def demo_run(task: Task, directory: Path, *flags: str) -> list[str]:
    """A short run of what `make demo` runs, which saves every other step."""
    steps = ["--train.steps", str(STEPS), "--checkpoint.every", "2", "--checkpoint.keep", "3"]
    return ["train", "examples/gspo_tiny.toml", *task.rl, "--run.dir", str(directory), *steps, *flags]


@pytest.fixture(scope="session")
def demo(ranks: Ranks, task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of that run, which nothing interrupted; a test that changes it takes a copy."""
    directory = tmp_path_factory.mktemp("demo") / "run"
    done = ranks.launch(*demo_run(task, directory))
    assert done.returncode == 0, done.stderr
    return directory
