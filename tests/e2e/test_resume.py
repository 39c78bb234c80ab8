"""A run that is killed, or asked to leave, continues as if nothing had happened: every part real, at TP=2."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from mcore_rl.checkpoint import committed, find
from mcore_rl.log import read_metrics
from mcore_rl.metric_names import MEASURED
from tests.checkpoint.support import stored
from tests.e2e.conftest import ENVIRONMENT, ROOT, STEPS, Task, command, demo_run, warm_start
from tests.e2e.ranks import Ranks, Started

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "mcore_rl")


def interrupted(process: subprocess.Popen[bytes] | Started, log: Path, when, number: int) -> int:
    """Send `number` to a started command (SIGKILL: to one of its ranks) once `when()`; its exit code."""
    try:
        end = time.monotonic() + 200
        while not when():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        target = psutil.Process(process.pid).children()[1] if number == signal.SIGKILL else process
        os.kill(target.pid, number)
        return process.wait(timeout=120)
    finally:
        process.kill()
        process.wait()


def assert_same(one: Path, other: Path, steps: Sequence[int] = range(STEPS + 1)) -> None:
    """Bitwise, but for times: parameters, moments, schedule, random states, data order, metrics."""
    last = f"checkpoints/step_{steps[-1]}"
    tensors, again = stored(one / last), stored(other / last)
    assert tensors.keys() == again.keys()
    assert [key for key in tensors if not torch.equal(tensors[key], again[key])] == []
    lines, its = timeless(one), timeless(other)
    assert [line["step"] for line in its] == list(steps)
    assert lines == its
    a, b = documents(one / last), documents(other / last)
    assert a == b


def timeless(directory: Path) -> list[dict]:
    lines = read_metrics(directory / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith(MEASURED)} for line in lines]


def documents(checkpoint: Path) -> dict:
    document = dict(find(checkpoint.parent, str(checkpoint)).document)
    return {key: document[key] for key in ("updates", "state", "rng", "layout")}


def test_a_rank_is_killed_and_torchrun_restarts_it(
    ranks: Ranks, task: Task, demo: Path, tmp_path: Path
) -> None:
    directory, log = tmp_path / "run", tmp_path / "log"

    def step_3_is_logged_and_step_2_committed() -> bool:
        return b"step 3/" in log.read_bytes() and bool(committed(directory / "checkpoints"))

    started = ranks.start(*TORCHRUN, *demo_run(task, directory), log=log)
    code = interrupted(started, log, step_3_is_logged_and_step_2_committed, signal.SIGKILL)
    assert code == 0, log.read_text()
    assert b"exitcode: -9" in log.read_bytes(), "the fault fired"
    assert b"resumed after step 2 from" in log.read_bytes()
    assert_same(demo, directory)
    events = read_metrics(directory / "events.jsonl")
    assert [event["step"] for event in events if event["kind"] == "resume"] == [2]
    assert [event["exit_code"] for event in events if event["kind"] == "end"][-1] == 0


def test_sigterm_and_then_a_disk_that_fills_up_under_a_publish_cost_no_step(
    ranks: Ranks, task: Task, demo: Path, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    """The first saves the step, the second ends the run with a typed error; both leave with 75.

    Until the first, the clock of the day jumps by a year every second, in every process of the run.
    """
    directory, log = tmp_path / "run", tmp_path / "log"
    start, clock = command(*demo_run(task, directory)), jumping_clock(tmp_path)
    step_1 = lambda: b"step 1/" in log.read_bytes()  # noqa: E731
    with log.open("wb") as out:
        env = os.environ | ENVIRONMENT | {"LD_PRELOAD": clock}
        process = subprocess.Popen(start, cwd=ROOT, env=env, stdout=out, stderr=out)
    code = interrupted(process, log, step_1, signal.SIGTERM)
    assert code == 75, log.read_text()
    stamps = [event["time"] for event in read_metrics(directory / "events.jsonl")]
    assert not clock or max(stamps) - min(stamps) > YEAR / 2, "the clock did not jump"
    assert b"is saved; --resume latest continues after it" in log.read_bytes()
    (step, _), *_ = reversed(committed(directory / "checkpoints"))
    assert read_metrics(directory / "metrics.jsonl")[-1]["step"] == step < STEPS
    refused = ranks.run(*demo_run(task, directory, "--parallel.tensor", "1"))
    assert refused.returncode == 2
    assert f"up to step {step}: continue it with --resume latest" in refused.stderr

    resume, no_disk = demo_run(task, directory, "--resume", "latest"), None
    try:
        disk = small_disk("size=40m")
    except pytest.skip.Exception as reason:  # the rest is proven all the same
        no_disk = reason
    else:
        resume += ["--publish.dir", str(disk / "weights")]
        full = tmp_path / "full"
        fill_up(ranks.start(*resume, log=full), full, f"step {step + 1}/", disk / "other")
        check_full(full.read_text(), disk)
    done = ranks.run(*resume, world=2)
    assert done.returncode == 0, done.stderr
    assert_same(demo, directory)
    if no_disk is not None:
        raise no_disk


YEAR = 365 * 86400
CLOCK = f"""
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long jump(void) {{
    struct timespec steady;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &steady);
    return (steady.tv_sec % 3 - 1) * {YEAR}L;
}}
int clock_gettime(clockid_t clock, struct timespec *found) {{
    int failed = syscall(SYS_clock_gettime, clock, found);
    if (!failed && clock == CLOCK_REALTIME) found->tv_sec += jump();
    return failed;
}}
int gettimeofday(struct timeval *found, void *zone) {{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    found->tv_sec = now.tv_sec;
    found->tv_usec = now.tv_nsec / 1000;
    return 0;
}}
time_t time(time_t *found) {{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}}
"""
"""a year behind, right, a year ahead, and so on, a second each"""


def jumping_clock(directory: Path) -> str:
    """A library that makes the clock of the day jump for who preloads it; none without a compiler of C."""
    if shutil.which("cc") is None:
        return ""
    (directory / "clock.c").write_text(CLOCK)
    made = directory / "clock.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(made), str(directory / "clock.c")]
    subprocess.run(command, check=True, timeout=60)
    return str(made)


def check_full(text: str, disk: Path) -> None:
    """What a run says whose weights found no room."""
    assert text.count("StorageError: ") == 1, text
    assert f"StorageError: {disk}/weights/" in text
    assert "No space left on device" in text
    assert "Traceback" not in text


def fill_up(process: Started, log: Path, said: str, file: Path) -> None:
    """Leave no room beside `file` once a started command has `said` so; it ends with 75."""
    try:
        end = time.monotonic() + 200
        while said not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        with suppress(OSError), file.open("wb", buffering=0) as other:
            while other.write(bytes(4096)):
                pass
        assert process.wait(timeout=120) == 75, log.read_text()
    finally:
        process.kill()
        process.wait()
    file.unlink()


def test_a_damaged_checkpoint_is_refused_and_previous_continues(
    ranks: Ranks, task: Task, tmp_path: Path
) -> None:
    """It resumes the supervised warm start: what reads checkpoints is the same, and no server starts."""
    directory, whole = tmp_path / "run", task.root / "warm_start"
    shutil.copytree(whole, directory)
    with (directory / "checkpoints" / "step_40" / "__1_0.distcp").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    refused = ranks.run(*warm_start(task, directory, "--resume", "latest"), world=2)
    assert refused.returncode == 2
    assert refused.stderr.count("__1_0.distcp does not have the checksum") == 1, refused.stderr
    assert "--resume previous" in refused.stderr
    done = ranks.run(*warm_start(task, directory, "--resume", "previous"), world=2)
    assert done.returncode == 0, done.stderr
    assert_same(whole, directory, range(1, 41))
