"""Stopped ranks are named and ended by who started them; running ones, and strangers, are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from mcore_rl.launch.stopped import StoppedRanks, ending_stopped
from mcore_rl.launch.verdict import Left, exit_code_of_launch
from mcore_rl.log import read_metrics
from mcore_rl.training.faults.siblings import ranks_below

LAUNCH = "mcore_rl_of_this_test"


@contextmanager
def child(rank: int, launch: str = LAUNCH, *, stopped: bool) -> Iterator[subprocess.Popen[bytes]]:
    """A process with the environment of a rank."""
    environment = os.environ | {"RANK": str(rank), "TORCHELASTIC_RUN_ID": launch}
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], env=environment)
    try:
        if stopped:
            process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_only_rank_is_named_and_ended_and_nobody_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        child(0, stopped=True) as only,
        child(1, stopped=False) as works,
        child(0, "another launch", stopped=True) as stranger,
    ):
        began = time.monotonic()
        with ending_stopped(LAUNCH, tmp_path, 1.0):
            assert only.wait(timeout=20) == -signal.SIGKILL
        assert 1.0 < time.monotonic() - began < 10
        assert works.poll() is None
        assert stranger.poll() is None
    (event,) = read_metrics(tmp_path / "events.jsonl")
    said = f"rank 0: its process {only.pid} has been stopped (SIGSTOP) for 1 s, and was ended"
    assert (event["rank"], event["type"]) == (0, "Hang")
    assert event["message"].startswith(said)
    assert capsys.readouterr().err.count(f"mcore-rl: {said}") == 1
    assert exit_code_of_launch(tmp_path, 0, 1, {0: Left(-9, 0)}) == 75
    assert capsys.readouterr().err == "", "no word of the kernel's out-of-memory killer"


def test_one_that_is_continued_in_time_goes_on(tmp_path: Path) -> None:
    """Its time counts from the last stop on, and only what the launcher has seen."""
    with child(0, stopped=True) as rank:
        ranks, watch = ranks_below(psutil.Process(), LAUNCH), StoppedRanks(tmp_path, 10.0)
        assert list(ranks) == [0]
        watch.look(ranks, 9.0)
        rank.send_signal(signal.SIGCONT)
        while ranks[0].status() == psutil.STATUS_STOPPED:
            time.sleep(0.01)
        watch.look(ranks, 9.0)
        rank.send_signal(signal.SIGSTOP)
        while ranks[0].status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        watch.look(ranks, 9.0)
        assert rank.poll() is None
        assert not (tmp_path / "events.jsonl").exists()
        watch.look(ranks, 2.0)
        assert rank.wait(timeout=20) == -signal.SIGKILL
