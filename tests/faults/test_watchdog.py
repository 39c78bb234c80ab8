"""The watchdog and the last words by themselves, in processes that import no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from mcore_rl.errors import ConfigError, ResourceError, RolloutError
from mcore_rl.log import EVENTS, append_event, read_metrics
from mcore_rl.training.faults.exits import (
    end_of_events,
    exit_code_of,
    last_words,
    not_worth_a_restart,
    record,
    recorded,
    typed,
)
from tests.sources import ROOT

HANG = """
import ctypes, os, signal, sys, time
from pathlib import Path
from mcore_rl.training.faults import watchdog
watchdog.GRACE_SECONDS = 0.2
with watchdog.Watchdog(Path(sys.argv[1]), "now", {ranks}, 1.0).watching() as _:
    {call}
print("left in peace")
"""


def program(directory: Path, call: str, ranks: int = 1) -> list[str]:
    return [sys.executable, "-c", HANG.format(call=call, ranks=ranks), str(directory)]


def hang(directory: Path, call: str) -> subprocess.CompletedProcess[str]:
    command = program(directory, call)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_hang_ends_with_the_place(tmp_path: Path):
    done = hang(tmp_path, "time.sleep(50)")
    assert done.returncode == 75, done.stderr
    assert "no progress for 1 s" in done.stderr
    assert "<string>" in (tmp_path / "stacks" / "now" / "rank_0.txt").read_text()


def test_a_hang_that_keeps_the_interpreter_ends_too(tmp_path: Path):
    done = hang(tmp_path, "ctypes.PyDLL(None).sleep(50)")
    assert done.returncode == 75
    assert "Timeout" in done.stderr
    assert "<string>" in done.stderr


STAYS = """
import atexit, ctypes, sys
from pathlib import Path
from mcore_rl.config import load_config
from mcore_rl.errors import ConfigError
from mcore_rl.launch import start
start.GRACE_SECONDS = 0.2

def work():
    atexit.register(ctypes.PyDLL(None).sleep, 50)
    raise ConfigError("the cause")

start.catch_signals()
sys.exit(start._run_recorded(load_config(Path(sys.argv[1]), sys.argv[2:]), work))
"""


@pytest.mark.slow
def test_a_rank_leaves_with_the_code_that_it_said_whatever_holds_it(tmp_path: Path):
    """Threads of torch look for a host like this; a signal on the way out changes nothing either."""
    flags = ["examples/sft_tiny.toml", "--run.dir", str(tmp_path), "--train.step_timeout", "1"]
    for stays, asked in ((STAYS, None), (STAYS.replace("PyDLL", "CDLL"), signal.SIGTERM)):
        process = subprocess.Popen(
            [sys.executable, "-c", stays, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        if asked is not None:
            wait_for_end(tmp_path, process)
            process.send_signal(asked)
        said = process.communicate(timeout=60)[1]
        assert "the cause" in said
        last = read_metrics(tmp_path / "events.jsonl")[-1]
        assert (last["kind"], last["exit_code"], process.returncode) == ("end", 2, 2)
        (tmp_path / "events.jsonl").unlink()


def wait_for_end(run_dir: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not (run_dir / "events.jsonl").exists() or '"end"' not in (run_dir / "events.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_who_makes_progress_is_left_in_peace(tmp_path: Path):
    """Negative control."""
    done = hang(tmp_path, "[(time.sleep(0.4), _) for _ in range(2)]")
    assert done.returncode == 0
    assert "left in peace" in done.stdout
    assert not (tmp_path / "stacks").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_by_the_other_one(tmp_path: Path, rank: int):
    """A rank sees its siblings by their parent, which is this process, and by torchrun's environment."""

    def of_launch(number: int) -> dict[str, str]:
        return os.environ | {"TORCHELASTIC_RUN_ID": str(tmp_path), "RANK": str(number)}

    command = program(tmp_path, "os.kill(os.getpid(), signal.SIGSTOP)", ranks=2)
    stopped = subprocess.Popen(command, cwd=ROOT, env=of_launch(rank))
    try:
        deadline = time.monotonic() + 60
        while psutil.Process(stopped.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        other = subprocess.run(
            program(tmp_path, "time.sleep(50)", ranks=2), cwd=ROOT, env=of_launch(1 - rank),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        stopped.kill()
        stopped.wait()
    assert other.returncode == 75, other.stderr
    assert "no progress for 1 s (train.step_timeout) since the start; stacks of 1 of 2 ranks" in other.stderr
    told = f"rank {rank} wrote no stack: it is stopped, swapped out or dead"
    told += f" (its process {stopped.pid} is stopped)"
    assert other.stderr.count(told) == 1
    assert f"  rank {1 - rank}: " in other.stderr
    (error,) = read_metrics(tmp_path / "events.jsonl")
    assert (error["type"], error["rank"]) == ("Hang", 1 - rank)
    assert told in error["message"]


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch):
    return lambda number: monkeypatch.setenv("RANK", str(number))


def test_the_same_error_of_two_ranks_is_said_once(tmp_path: Path, as_rank, capsys):
    since = end_of_events(tmp_path)
    for rank in (1, 0):
        as_rank(rank)
        assert last_words(tmp_path, ConfigError("no such file"), since) == 2
    assert capsys.readouterr().err.count("ConfigError: no such file") == 1
    as_rank(2)
    assert last_words(tmp_path, ConfigError("another file"), since) == 2
    assert "another file" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "events.jsonl")) == 2


def test_what_all_ranks_share_is_said_before_anything_is_closed(tmp_path: Path, as_rank, capsys):
    """Another rank has ended by then, and torchrun ends the one that closes servers."""
    said = []

    def run(error: RolloutError) -> None:
        with ExitStack() as stack, recorded(tmp_path):
            stack.callback(lambda: said.append(capsys.readouterr().err))
            raise error

    for rank in (0, 1):
        as_rank(rank)
        error = RolloutError("no server")
        error.shared = True
        with pytest.raises(RolloutError):
            run(error)
        assert last_words(tmp_path, error, 0) == 75
    assert said == ["mcore-rl: RolloutError: no server\n", ""]
    assert capsys.readouterr().err == ""
    assert [event["message"] for event in read_metrics(tmp_path / "events.jsonl")] == ["no server"]


def test_an_echo_is_silent_and_a_cause_is_not(tmp_path: Path, as_rank, capsys):
    as_rank(1)
    record(tmp_path, KeyError("of an earlier attempt"))
    since = end_of_events(tmp_path)
    cause = KeyError("the cause")
    record(tmp_path, cause)
    as_rank(0)
    assert last_words(tmp_path, RuntimeError("Connection closed by peer"), since) == 1
    assert capsys.readouterr().err == ""
    as_rank(1)
    assert last_words(tmp_path, cause, since) == 1
    assert "KeyError on rank 1: 'the cause'" in capsys.readouterr().err
    as_rank(2)
    assert last_words(tmp_path, ValueError("no echo has this type"), since) == 1
    assert "no echo" in capsys.readouterr().err


def test_no_memory_is_one_cause_with_one_code(tmp_path: Path, as_rank, capsys):
    """`recorded` and the last words agree, since the launcher goes by the first event."""
    as_rank(1)
    with pytest.raises(ResourceError) as lacking, recorded(tmp_path):
        raise MemoryError
    assert last_words(tmp_path, typed(lacking.value), 0) == 75
    (event,) = read_metrics(tmp_path / "events.jsonl")
    assert (event["type"], event["exit_code"]) == ("ResourceError", 75)
    assert exit_code_of(MemoryError()) == 75
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "gets no more memory at" in said


def test_a_restart_of_what_no_restart_mends(tmp_path: Path, as_rank, monkeypatch):
    as_rank(1)
    append_event(tmp_path, "start")
    record(tmp_path, ConfigError("wrong"))
    assert not_worth_a_restart(tmp_path) is None, "a new launch tries again"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert (not_worth_a_restart(tmp_path) or {})["message"] == "wrong"
    append_event(tmp_path, "start")
    record(tmp_path, OSError("a disk"))
    assert not_worth_a_restart(tmp_path) is None


@pytest.mark.parametrize(
    "line",
    [
        {"x": 1},
        {"kind": ["error"]},
        {"kind": "error"},
        {"kind": "end", "rank": None},
        {"kind": "error", "rank": 1, "type": "A", "message": "m", "exit_code": None},
        {"kind": "error", "rank": 1, "type": "A", "message": 5, "exit_code": 2},
    ],
)
def test_a_line_that_no_run_wrote_hides_no_error(tmp_path: Path, line: dict, monkeypatch, capsys) -> None:
    (tmp_path / EVENTS).write_text(json.dumps(line) + "\n")
    assert last_words(tmp_path, RuntimeError("the cause"), 0) == 75
    assert "the cause" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not_worth_a_restart(tmp_path) is None
