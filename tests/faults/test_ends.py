"""Exit code 0 means that every step was done: user code that exits, vanishes, crashes or forks in a rank."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mcore_rl.log import read_metrics
from tests.e2e.ranks import Ranks
from tests.sources import ROOT

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def task(folder: Path) -> list[str]:
    """Flags of two steps of 32 samples."""
    return [
        *("--data.train", f"{folder}/train.jsonl", "--model.path", f"{folder}/policy"),
        *("--train.steps", "2", "--train.eval_every", "0"),
        *("--data.eval", f"{folder}/eval.jsonl"),
        *("--rollout.prompts_per_step", "8", "--rollout.samples_per_prompt", "4"),
        *("--optimizer.warmup_steps", "0"),
    ]


@pytest.fixture(scope="module")
def served(task: list[str], server_url: str) -> list[str]:
    """The same of runs that share a server, where its end is not what is proven."""
    return [*task, "--rollout.urls", f'["{server_url}"]']


OWN_SERVER = ("--rollout.threads", "1")


def command(run_dir: Path, ranks: int, *flags: str) -> list[str]:
    """Its arguments."""
    own = ["--run.dir", str(run_dir), "--reward.workers", "1", "--parallel.tensor", str(ranks)]
    return ["train", "examples/gspo_tiny.toml", *flags, *own]


def train(
    run_dir: Path, function: str, ranks: int, *flags: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    key = "--algorithm.loss" if function.startswith("losses:") else "--reward.function"
    words = command(run_dir, ranks, *flags, key, f"tests.faults.{function}")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(
        [sys.executable, "-m", "mcore_rl", *words],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=380, check=False,
    )  # fmt: skip


def vanishing(run_dir: Path, served: list[str]) -> list[str]:
    return command(run_dir, 1, *served, "--algorithm.loss", "tests.faults.losses:vanish")


def ends(run_dir: Path) -> dict[int, int]:
    events = read_metrics(run_dir / "events.jsonl")
    return {event["rank"]: event["exit_code"] for event in events if event["kind"] == "end"}


def test_a_reward_that_exits_ends_the_run_as_its_error(ranks: Ranks, served: list[str], tmp_path: Path):
    """With exit code 0, which is that of success; tests/rewards has all that a reward can raise."""
    leaving = ("--reward.function", "tests.faults.rewards:leave", "--reward.max_void", "0")
    done = ranks.run(*command(tmp_path, 2, *served, *leaving), world=2)
    assert done.returncode == 2, done.stderr
    said = (
        "mcore-rl: RewardError: reward tests.faults.rewards:leave gave 1 of 32 samples no reward (raised: 1)"
    )
    assert done.stderr.count(said) == 1
    assert "raised SystemExit: 0" in done.stderr
    assert "Traceback" not in done.stderr
    assert ends(tmp_path) == {0: 2, 1: 2}


@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_that_vanishes_with_code_0_is_named_and_not_its_echo(
    ranks: Ranks, served: list[str], tmp_path: Path, world: int
):
    """The launcher sees it; of two ranks, the other one has to find it among the system's processes."""
    if world == 1:
        done = ranks.launch(*vanishing(tmp_path, served))
    else:
        done = train(tmp_path, "losses:vanish", world, *served)
    assert done.returncode == 75, done.stderr
    said = "mcore-rl: rank 0 left with exit code 0, without an `end` event, after step 0; something in it"
    assert done.stderr.count(said) == 1, done.stderr
    assert "Traceback" not in done.stderr, "the broken connection of rank 1"
    assert 0 not in ends(tmp_path)
    assert read_metrics(tmp_path / "events.jsonl")[-1]["type"] == "RankLost"


def test_a_crash_says_where_and_after_which_step(task: list[str], tmp_path: Path):
    """And its server ends with it: one that held the other end of stderr would keep us waiting here."""
    done = train(tmp_path, "losses:crash", 1, *task, *OWN_SERVER, METRICS=str(tmp_path / "metrics.jsonl"))
    assert done.returncode == 75, done.stderr
    assert (
        "mcore-rl: rank 0 was ended by signal 11 (SIGSEGV), without an `end` event, after step 1"
        in done.stderr
    )
    stack = done.stderr.split("Fatal Python error: Segmentation fault")[1]
    assert "losses.py" in stack
    assert "in crash" in stack


def works(number: int) -> bool:
    """Whether a process is there; one that ended, and that nobody has asked for its exit code, is not."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_reward_forks_ends_with_the_run_and_never_trains(
    ranks: Ranks, task: list[str], tmp_path: Path
):
    """A pool of processes works while signals save a step; then a resumed run has nothing left to do."""
    run_dir, forked = tmp_path / "run", tmp_path / "forked"
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        done = train(
            run_dir,
            "rewards:fork",
            1,
            *(*task, *OWN_SERVER, "--checkpoint.every", "1"),
            FORKED=str(forked),
        )
        assert stranger.poll() is None, "only what the run has started is ended"
    finally:
        stranger.kill()
        stranger.wait()
    assert done.returncode == 0, done.stderr
    children = dict(line.split() for line in forked.read_text().splitlines())
    assert children.keys() == {"returns", "sleeps", "daemon"}, "all of them were there"
    assert not [what for what, number in children.items() if works(int(number))]
    assert done.stderr.count("was still there at the end of the run; it is ended") == 1, "daemon"
    assert [record.get("void/forked") for record in read_metrics(run_dir / "metrics.jsonl")] == [
        None,
        1,
        None,
    ]
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == [0, 1, 2]
    assert sum(event["kind"] == "end" for event in read_metrics(run_dir / "events.jsonl")) == 1
    last_served = (run_dir / "server.log").stat().st_mtime_ns
    began = time.monotonic()
    fork = ("--reward.function", "tests.faults.rewards:fork", "--checkpoint.every", "1", "--resume")
    again = ranks.launch(*command(run_dir, 1, *task, *OWN_SERVER, *fork))
    assert again.returncode == 0, again.stderr
    assert "mcore-rl: nothing to do: step 2 of train.steps = 2 is done" in again.stderr
    assert "raise train.steps" in again.stderr
    assert (run_dir / "server.log").stat().st_mtime_ns == last_served, "no server was started"
    assert time.monotonic() - began < 120
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == [0, 1, 2]
