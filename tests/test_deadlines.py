"""Every wait of the package ends: each has a deadline of its own, or is listed here with what ends it."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.sources import READERS, ROOT, modules

pytestmark = READERS
WAITS = frozenset(
    {"wait", "join", "communicate", "acquire", "recv", "accept", "get", "result", "barrier", "select"}
)
"""methods that wait for as long as it takes when they are called without an argument"""
RUNS = frozenset({"run", "call", "check_call", "check_output"})
"""of subprocess, which wait without `timeout`"""
ENDED_BY = {
    ("checkpoint/checkpoints.py", "self.wait"): "its own deadline, `timeout` of Checkpoints",
    (
        "convert/to_mcore.py",
        "writer.write_data(plan, cast(Any, planner)).wait",
    ): "a future that is done: torch writes before",
    ("data/prompts.py", "examination.result"): "a value of our own, no future",
    ("demo/command.py", "process.wait"): "a training run, which has its own deadlines",
    ("environments/gateway/streams.py", "work.result"): "a task that is done",
    (
        "environments/live.py",
        "self._new.get",
    ): "the request beside it, which has a deadline and ends the stream",
    ("environments/run.py", "deadlines.passed.result"): "a future that is done",
    ("environments/run.py", "played.result"): "a task that is done",
    ("environments/run.py", "task.result"): "tasks that are done",
    ("evaluate/sampling.py", "server.wait"): "LocalServer.wait, which ends after rollout.start_timeout",
    (
        "launch/stopped.py",
        "thread.join",
    ): "the event that was set before: the thread looks at it once a second",
    (
        "model/hf/torch_dist.py",
        "storage.read_data(LoadPlan(items), cast(Any, _Target(out, where.offset))).wait",
    ): ("a future that is done: torch reads before"),
    ("parallel/head/passes.py", "work.wait"): "a collective: its group's timeout",
    ("parallel/pool.py", "dist.barrier"): "a collective: its group's timeout",
    ("parallel/pool.py", "parent.join"): "a thread of a rank that lives as long as its parent",
    ("parallel/pool.py", "rank.process.join"): "SIGKILL, sent before",
    ("report/follow.py", "ended.wait"): "whoever ends the command",
    ("rewards/process.py", "self.process.wait"): "SIGKILL, sent before",
    ("rollout/dispatch.py", "answer.result"): "a task that is done",
    ("rollout/dispatch.py", "server.lost.wait"): "one of two: the request beside it has a deadline",
    ("rollout/fleet.py", "server.wait"): "LocalServer.wait, as above",
    ("rollout/inflight.py", "self._changed.wait"): "`take` calls it with a timeout",
    ("rollout/processes.py", "self.wait"): "LocalServer.wait, as above",
    ("server/streams.py", "self.wake.wait"): "the engine, or the client that leaves",
    ("server/server.py", "stop.wait"): "whoever ends the server",
    ("trackers/sender.py", "sender.wait"): "its own deadline, CLOSE_SECONDS",
    ("training/assemble_servers.py", "server.wait"): "LocalServer.wait, as above",
    ("training/checkpoint.py", "checkpoints.wait"): "Checkpoints.wait, as above",
}
"""(file, what is called) -> what ends the wait"""


def waits(tree: ast.AST) -> Iterator[str]:
    """What is called without an argument, of methods that wait; and runs of a program without a timeout."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in WAITS | RUNS:
            continue
        name = ast.unparse(node.func)
        if node.func.attr in WAITS and not node.args and not node.keywords:
            yield name
        is_run = node.func.attr in RUNS and ast.unparse(node.func.value) == "subprocess"
        if is_run and "timeout" not in {keyword.arg for keyword in node.keywords}:
            yield name


def test_every_wait_has_a_deadline() -> None:
    found = Counter(
        (path.removeprefix("mcore_rl/"), name)
        for path, tree in modules("mcore_rl").items()
        for name in waits(tree)
    )
    assert set(found) - set(ENDED_BY) == set(), "say what ends these, in ENDED_BY, or give them a deadline"
    assert set(ENDED_BY) - set(found) == set(), "these are no more"


@pytest.mark.parametrize(
    "line", ["process.wait()", "thread.join()", "subprocess.run(['ls'])", "queue.recv()"]
)
def test_the_gate_sees_a_wait_without_a_deadline(line: str) -> None:
    assert list(waits(ast.parse(line)))
    timed = line.replace("()", "(1.0)").replace("(['ls'])", "(['ls'], timeout=1.0)")
    assert not list(waits(ast.parse(timed)))


def test_no_deadline_is_of_a_clock_that_somebody_may_set() -> None:
    """`time.time` is written into logs and replies, and compared with nothing."""
    stamps = {
        "log.py",
        "server/api.py",
        "server/replies.py",
        "spans.py",
        "environments/gateway/openai_api.py",
        "environments/gateway/responses_api.py",
        "trackers/services.py",
    }
    for path, tree in modules("mcore_rl").items():
        if "time.time" not in (source := (ROOT / path).read_text()):
            continue
        for node in ast.walk(tree):
            compared = isinstance(node, ast.Compare | ast.BinOp | ast.While)
            if compared and "time.time()" in ast.unparse(node) and "* 1000" not in ast.unparse(node):
                pytest.fail(f"{path}:{node.lineno}: compares the clock of the day; use time.monotonic()")
        if "time.time()" in source:
            assert path.removeprefix("mcore_rl/") in stamps, "time.monotonic() is for deadlines"
