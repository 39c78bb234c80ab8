"""Ranks that die, hang, raise or are asked to leave under torchrun: nobody waits, and one says why.

Where ranks find each other by what the system says of them, or torchrun is killed, it starts them itself; in
the other tests its ranks are forked (tests/e2e/forked.py), and all else of it is what it is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from examples.arithmetic import main as write_task
from mcore_rl.checkpoint import committed
from mcore_rl.log import read_metrics
from tests.e2e.ranks import Ranks, Started
from tests.sources import ROOT

pytestmark = [pytest.mark.xdist_group("launched"), pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of four supervised steps of a model of one layer."""
    folder = tmp_path_factory.mktemp("faults")
    small = ["--train", "40", "--eval", "5", "--layers", "1", "--hidden", "64"]
    assert write_task([str(folder), *small]) == 0
    return [
        *("--data.train", f"{folder}/train.jsonl", "--model.path", f"{folder}/model"),
        *("--train.steps", "4", "--optimizer.warmup_steps", "0", "--supervised.batch_size", "16"),
    ]


@contextmanager
def torchrun(
    run_dir: Path, world: int, faults: list, *flags: str, forks: Ranks | None = None
) -> Iterator[subprocess.Popen[str] | Started]:
    """`run_dir`.log has what it says; what is left of it in the end is killed."""
    command = ["--standalone", "--nproc-per-node", str(world), "--max-restarts", str(len(faults) - 1)]
    command += ["tests/faults/faulty.py", json.dumps(faults), "train", "examples/sft_tiny.toml"]
    command += ["--run.dir", str(run_dir), "--parallel.tensor", str(world), *flags]
    environment, path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, run_dir.with_suffix(".log")
    if forks is not None:
        process = forks.start("torchrun", *command, log=path, **environment)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", *command]
        with path.open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log, text=True
            )
    family = [psutil.Process(process.pid)]
    try:
        yield process
    finally:
        if process.poll() is None:
            family += family[0].children(recursive=True)
            for member in family:
                member.kill()
            process.wait()


@dataclass(frozen=True)
class Torchrun:
    run_dir: Path
    process: subprocess.Popen[str] | Started


@pytest.fixture(scope="module")
def stopped(task: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Torchrun]:
    """Rank 0 of two is stopped, and the watchdog has said so.

    torchrun gives a rank that does not answer 30 seconds, which no option shortens after a failure. So the
    last test here looks at its end, and the others run meanwhile.
    """
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    fault = {"do": "stop", "rank": 0, "step": 2}
    with torchrun(run_dir, 2, [fault], *task, "--train.step_timeout", "10") as process:
        wait_until(lambda: "\n  rank 1: " in said(run_dir), process)
        yield Torchrun(run_dir, process)


def process_of_fault(log: str) -> int:
    return int(log.split("fault: stop in process ")[1].split()[0])


def said(run_dir: Path) -> str:
    return run_dir.with_suffix(".log").read_text()


def wait_until(condition, process: subprocess.Popen[str] | Started, seconds: float = 150.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_error_of_one_rank_ends_all_and_is_the_one_that_is_printed(
    ranks: Ranks, task: list[str], tmp_path: Path
):
    """A bug is worth a restart, a wrong file is not: the third attempt ends before it begins, and says why.

    Also where rank 1 comes to that long before rank 0.
    """
    run_dir = tmp_path / "run"
    late = {"do": "late", "rank": 0, "step": 0}
    faults = [{"do": "raise", "rank": 1, "step": 2}, {"do": "refuse", "rank": 1, "step": 2}, late]
    with torchrun(run_dir, 2, faults, *task, forks=ranks) as process:
        assert process.wait(timeout=280) == 1
    log = said(run_dir)
    assert log.count("fault: raise") == log.count("fault: refuse") == 1, "the faults fired"
    assert log.count("mcore-rl: ValueError on rank 1: only this rank has this bug") == 1
    assert log.count("mcore-rl: ConfigError: only this rank has a wrong file") == 1
    assert "mcore-rl: RuntimeError" not in log, "the echo on rank 0"
    assert log.count("Traceback (most recent call last)") == 2, "of the bug, and torchrun's own"
    events = read_metrics(run_dir / "events.jsonl")
    codes = [event["exit_code"] for event in events if event["kind"] == "end"]
    assert codes == [1, 1, 2, 2], "an echo ends with the code of its cause"
    assert log.count("a restart would meet it again: ConfigError") == 1
    assert sum(event["kind"] == "start" for event in events) == 2


def test_a_rank_that_never_comes_leaves_the_stacks_of_all(ranks: Ranks, task: list[str], tmp_path: Path):
    run_dir, limit = tmp_path / "run", 10.0
    fault = {"do": "hang", "rank": 1, "step": 2}
    patience = ("--train.step_timeout", str(limit))
    with torchrun(run_dir, 2, [fault], *task, *patience, forks=ranks) as process:
        wait_until(lambda: "fault: hang" in said(run_dir), process)
        since = time.monotonic()
        assert process.wait(timeout=120) == 1
        assert time.monotonic() - since < 2 * limit + 15
    log = said(run_dir)
    assert re.search(r"exitcode *: 75\b", log), "what torchrun says of the ranks"
    assert "no progress for 10 s (train.step_timeout) since step 1; stacks of 2 of 2 ranks" in log
    assert "  rank 1: " in log
    assert "faulty.py" in log.split("  rank 1: ")[1].partition("\n")[0]
    (attempt,) = (run_dir / "stacks").iterdir()
    stacks = {path.name: path.read_text() for path in attempt.iterdir()}
    assert stacks.keys() == {"rank_0.txt", "rank_1.txt"}
    assert "faulty.py" in stacks["rank_1.txt"]
    assert "optimizer.py" in stacks["rank_0.txt"]
    errors = [event for event in read_metrics(run_dir / "events.jsonl") if event["kind"] == "error"]
    assert errors[0]["type"] == "Hang", "the cause; a broken connection may follow it"


def test_a_stopped_rank_is_named_before_any_collective_gives_up(stopped: Torchrun):
    """Rank 0, which mostly speaks for all; the watchdog's own test stops either of two."""
    log = said(stopped.run_dir)
    assert "no progress for 10 s (train.step_timeout) since step 1; stacks of 1 of 2 ranks" in log
    told = "rank 0 wrote no stack: it is stopped, swapped out or dead"
    told += f" (its process {process_of_fault(log)} is stopped)"
    assert log.count(told) == 1
    assert "  rank 1: " in log, "where the other one waits"
    assert "Timed out waiting" not in log, "the collective's own deadline"
    (error,) = [e for e in read_metrics(stopped.run_dir / "events.jsonl") if e["kind"] == "error"]
    assert error["type"] == "Hang"
    assert told in error["message"]


def test_under_torchrun_a_rank_that_vanishes_is_named_by_another(task: list[str], tmp_path: Path):
    run_dir = tmp_path / "run"
    with torchrun(run_dir, 2, [{"do": "vanish", "rank": 0, "step": 2}], *task) as process:
        assert process.wait(timeout=280) == 1
    log = said(run_dir)
    assert log.count("mcore-rl: rank 0 left without a word, and took its connections with it") == 1
    assert "RuntimeError" not in log, "the echo on rank 1"
    events = read_metrics(run_dir / "events.jsonl")
    assert [event["rank"] for event in events if event["kind"] == "error"] == [1, 1]
    assert events[-2]["type"] == "RankLost"
    assert (events[-1]["kind"], events[-1]["exit_code"]) == ("end", 75)


def test_too_few_open_files_are_said_with_the_remedy(ranks: Ranks, task: list[str], tmp_path: Path):
    """At the start, where the limit cannot do; later, where a leak has met it."""
    train = [sys.executable, "-m", "mcore_rl", "train", "examples/sft_tiny.toml", *task]
    train += ["--run.dir", str(tmp_path / "few"), "--parallel.tensor", "1"]
    few = subprocess.run(
        ["bash", "-c", 'ulimit -n 64; exec "$@"', "bash", *train],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert few.returncode == 2, few.stderr
    assert "ConfigError: ulimit -n: a process may open 64 files here, and a rank needs 256" in few.stderr
    assert "Traceback" not in few.stderr
    assert not (tmp_path / "few").exists()

    run_dir = tmp_path / "run"
    fault = {"do": "no more files", "rank": 0, "step": 2}
    with torchrun(run_dir, 1, [fault], *task, forks=ranks) as process:
        assert process.wait(timeout=280) == 1
    log = said(run_dir)
    assert log.count("mcore-rl: ResourceError: rank 0 may open ") == 1
    assert "Raise it: `ulimit -n 65536` before the command" in log
    assert read_metrics(run_dir / "events.jsonl")[-1]["exit_code"] == 75


@pytest.mark.parametrize(
    ("number", "patient"), [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGHUP, True)]
)
def test_the_first_interrupt_saves_the_step_and_the_second_does_not_wait(
    ranks: Ranks, task: list[str], tmp_path: Path, number: signal.Signals, patient: bool
):
    """The hangup of a terminal is one."""
    run_dir = tmp_path / "run"
    fault = {"do": "slow" if patient else "hang", "rank": 0, "step": 2}
    with torchrun(run_dir, 1, [fault], *task, "--checkpoint.every", "100", forks=ranks) as process:
        wait_until(lambda: "fault: " in said(run_dir), process)
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.send_signal(number)
        if not patient:
            time.sleep(3)
            assert all(one.is_running() for one in family), "the first one waits for the step"
            process.send_signal(signal.SIGINT)
        since = time.monotonic()
        process.wait(timeout=60)
        assert time.monotonic() - since < 30
        assert not psutil.wait_procs(family, timeout=5)[1]
    saved = [step for step, _ in committed(run_dir / "checkpoints")]
    assert saved == ([2] if patient else [])
    assert ("asked to leave: step 2 is saved" in said(run_dir)) == patient


def test_a_run_under_nohup_goes_on_when_its_terminal_hangs_up(task: list[str], tmp_path: Path):
    run_dir = tmp_path / "run"
    start = ["nohup", sys.executable, "-m", "mcore_rl", "train", "examples/sft_tiny.toml", *task]
    start += ["--run.dir", str(run_dir), "--parallel.tensor", "1", "--train.steps", "150"]
    with run_dir.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            start, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(lambda: "step 1/" in said(run_dir), process)
        assert "step 150/" not in said(run_dir), "it has all its steps already"
        os.killpg(process.pid, signal.SIGHUP)  # what the kernel does to all that the terminal was of
        assert process.wait(timeout=120) == 0, said(run_dir)
    finally:
        process.kill()
        process.wait()
    assert read_metrics(run_dir / "metrics.jsonl")[-1]["step"] == 150


def test_a_killed_launcher_leaves_no_rank(task: list[str], tmp_path: Path):
    run_dir = tmp_path / "run"
    with torchrun(run_dir, 1, [{"do": "hang", "rank": 0, "step": 0}], *task) as process:
        wait_until(lambda: "fault: hang" in said(run_dir), process)
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert ranks
        process.kill()
        process.wait()
        alive = psutil.wait_procs(ranks, timeout=10)[1]
        for rank in alive:
            rank.kill()
        assert not alive


def test_a_stopped_rank_is_ended_with_the_run(stopped: Torchrun):
    assert stopped.process.wait(timeout=60) == 1
    assert not psutil.pid_exists(process_of_fault(said(stopped.run_dir)))
