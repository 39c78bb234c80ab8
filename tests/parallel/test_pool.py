"""The process pool itself: values, errors, deaths, hangs, and what remains afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing import get_context

import psutil
import pytest
import torch
import torch.distributed as dist

from mcore_rl.errors import LayoutError
from mcore_rl.parallel.pool import Pool, RankError, RankTimeoutError, _describe_hang, _Rank, spawn
from tests.sources import ROOT

pytestmark = pytest.mark.xdist_group("ranks")


class NeedsTwoArgumentsError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def rank_sum(offset: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    return os.getpid(), total


def environment() -> tuple[str, str, str, int]:
    return os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], torch.get_num_threads()


def fail_on_last(error: type[Exception], *args: str) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise error(*args)
    dist.barrier()


def exit_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_first(marker: str) -> None:
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(600)  # {marker}"])
    if dist.get_rank() == 0:
        time.sleep(600)


def quit_python() -> None:
    sys.exit(3)


def remember() -> None:
    os.environ["MCORE_RL_TEST_SETUP"] = "done"


def recall() -> str | None:
    return os.environ.get("MCORE_RL_TEST_SETUP")


def has_marker(marker: str) -> list[int]:
    return [
        p.pid for p in psutil.process_iter(["cmdline"]) if any(marker in a for a in p.info["cmdline"] or ())
    ]


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive := [
        p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE
    ]:
        if time.monotonic() > deadline:
            print("still alive:", alive)
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def pool():
    with Pool(2, setup=remember) as pool:
        yield pool


def test_values_come_back_in_rank_order(pool: Pool) -> None:
    (pid0, sum0), (pid1, sum1) = pool.run(rank_sum, torch.tensor([1.0, 10.0], dtype=torch.float64))
    assert len({pid0, pid1, os.getpid()}) == 3
    assert sum0.tolist() == sum1.tolist() == [3.0, 21.0]
    assert pool.run(environment) == [("0", "0", "2", 1), ("1", "1", "2", 1)]
    assert [pid for pid, _ in pool.run(rank_sum, torch.zeros(1))] == [pid0, pid1], "processes are kept"


def test_an_error_keeps_its_type_and_names_its_rank(pool: Pool) -> None:
    before = [pid for pid, _ in pool.run(rank_sum, torch.zeros(1))]
    with pytest.raises(LayoutError, match="tp=3") as caught:
        pool.run(fail_on_last, LayoutError, "tp=3")
    note = caught.value.__notes__[-1]
    assert "on rank 1 of 2 in fail_on_last" in note
    assert "raise error(*args)" in note, "the rank's own traceback"
    assert gone(before)
    after = [pid for pid, _ in pool.run(rank_sum, torch.zeros(1))]
    assert not set(before) & set(after), "a broken group is never used again"
    assert pool.run(recall) == ["done", "done"], "setup runs in the new processes too"


def test_errors_that_cannot_travel_become_rank_errors(pool: Pool) -> None:
    with pytest.raises(RankError, match="NeedsTwoArgumentsError: a b"):
        pool.run(fail_on_last, NeedsTwoArgumentsError, "a", "b")
    with pytest.raises(RankError, match="SystemExit: 3"):
        pool.run(quit_python)


def test_a_killed_rank_is_named(pool: Pool) -> None:
    with pytest.raises(RankError, match="rank 1 of 2 died with exit code -9 in exit_on_last"):
        pool.run(exit_on_last)


def test_a_hang_ends_at_the_deadline_with_everything_it_started(pool: Pool) -> None:
    pids = [pid for pid, _ in pool.run(rank_sum, torch.zeros(1))]
    marker = f"mcore_rl_hang_{os.getpid()}"
    start = time.monotonic()
    with pytest.raises(RankTimeoutError, match="no answer from rank 0 of 2 in hang_on_first") as caught:
        pool.run(hang_on_first, marker, timeout=1.0)
    assert time.monotonic() - start < 5.0
    assert "line" in str(caught.value), "the Python stack of the hanging rank"
    assert "in hang_on_first" in str(caught.value).split("stood here:")[1]
    assert isinstance(caught.value, TimeoutError)
    assert gone(pids)
    assert gone(has_marker(marker))


def test_spawn_leaves_no_process() -> None:
    pids = [pid for pid, _ in spawn(rank_sum, 2, torch.zeros(1))]
    assert gone(pids, seconds=0.5)


@pytest.mark.slow
def test_ranks_end_with_a_killed_caller() -> None:
    program = textwrap.dedent("""
        import os, time
        from mcore_rl.parallel.pool import Pool
        if __name__ == "__main__":
            pool = Pool(2)
            print(*pool.run(os.getpid), flush=True)
            pool.run(time.sleep, 600)
    """)
    caller = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    pids = [int(pid) for pid in caller.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(psutil.pid_exists, pids)), "the check below can fail"
    caller.kill()
    caller.communicate()
    assert gone(pids)


@pytest.mark.parametrize("ended", [False, True])
def test_a_rank_without_a_process_is_never_signalled(tmp_path, ended: bool) -> None:
    """Number 0, in place of a process that never started, is the whole group of the caller."""
    context = get_context("forkserver")
    process = context.Process(target=quit_python)
    if ended:
        process.start()
        process.join()
    got = []
    before = signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
    ours, theirs = context.Pipe()
    try:
        _describe_hang([_Rank(0, process, ours, tmp_path / "stack")], 1, "nothing")
    finally:
        signal.signal(signal.SIGUSR1, before)
        ours.close()
        theirs.close()
    assert not got


@pytest.mark.slow
def test_an_open_pool_does_not_hang_the_interpreter_at_exit() -> None:
    program = "import os; from mcore_rl.parallel.pool import Pool; pool = Pool(1); pool.run(os.getpid)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def error_of_wrong_shapes() -> str:
    from mcore_rl.parallel.head import dense_log_prob_entropy  # here, so that the pool's set-up comes first

    try:
        dense_log_prob_entropy(torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64))
    except Exception as error:
        return type(error).__name__
    return "none"


def error_of_a_wrong_type() -> str:
    """Of a function without an array."""
    from mcore_rl.parallel.mesh import build_mesh

    try:
        build_mesh("tp2")  # pyright: ignore[reportArgumentType]
    except Exception as error:
        return type(error).__name__
    return "none"


@pytest.mark.slow
def test_annotations_are_checked_in_the_processes_of_the_pools(pool2: Pool) -> None:
    assert pool2.run(error_of_wrong_shapes) == ["TypeCheckError"] * 2
    assert pool2.run(error_of_a_wrong_type) == ["BeartypeCallHintParamViolation"] * 2
    program = "from tests.parallel.test_pool import error_of_wrong_shapes; print(error_of_wrong_shapes())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout == "RuntimeError\n", "what torch itself says, far from the cause"


UNGUARDED = """
from mcore_rl.parallel.pool import spawn
spawn(print, 2)
"""


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_an_error_and_signals_nobody(tmp_path):
    """Its ranks run it again and cannot start; whoever started it, in the same process group, lives on."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {script}; echo the shell lives, code $?"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "the shell lives, code 1\n", (done.returncode, done.stderr)
    assert "came to start a pool itself: put the script's calls under `if __name__" in done.stderr
