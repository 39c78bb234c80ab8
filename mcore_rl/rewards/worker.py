"""A process that scores: `python -m mcore_rl.rewards PARENT_PID SOCKET`, started by pool.py.

It imports no torch, unless the reward function does. The function runs in the main thread, where alarms work.
What it is asked comes pickled from the trainer; what it answers is JSON, which the trainer reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import json
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from mcore_rl.errors import RewardError
from mcore_rl.rewards.outcome import Void, join_outcomes, read_outcome
from mcore_rl.rewards.score import load_rewards, takes_group
from mcore_rl.rewards.task import PROCESSES, TIMEOUT, Task
from mcore_rl.rewards.tokenizer import DIRECTORY
from mcore_rl.terminal import short
from mcore_rl.types import Group, Sample
from mcore_rl.user_code import place, said

EXIT_COPY = 113
"""what a process ends with that a reward function forked and let go"""
_COPY_SECONDS = 0.2
"""after a call that forked: a copy that came back has ended by then"""
_PR_SET_PDEATHSIG = 1


class _Scorer:
    """The functions, called for one sample or group at a time."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.functions = load_rewards(task.functions)
        self.of_group = [takes_group(function) for function in self.functions]
        self._process = os.getpid()
        self._forks = 0
        os.register_at_fork(after_in_parent=self._forked)

    def _forked(self) -> None:
        self._forks += 1

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.new_event_loop()

    def score(self, numbers: Sequence[int], asked: Sample | Group) -> list[Any]:
        """The answer of these functions for each sample, of which one may be void.

        Never raises, and never returns in a process that was forked.
        """
        samples = asked.samples if isinstance(asked, Group) else (asked,)
        answers: list[list[Any]] = [[] for _ in samples]
        for number in numbers:
            found = self._score(number, asked, samples)
            for its, one in zip(answers, found, strict=True):
                its.append(one)
            if all(isinstance(one, dict) for one in found):
                break
        return [_joined(its, sample) for its, sample in zip(answers, samples, strict=True)]

    def _score(self, number: int, asked: Sample | Group, samples: Sequence[Sample]) -> list[Any]:
        """The Outcome of one function for each sample, or why there is none."""
        self._forks = 0
        try:
            found = self._call(number, asked)
            if not isinstance(asked, Group):
                found = [found]
            elif not isinstance(found, list | tuple) or len(found) != len(samples):
                raise RewardError(f"no list of {len(samples)} rewards, one per sample of the group")
        except RewardError as error:
            return [_void("returned", f"returned {error}")] * len(samples)
        except BaseException as error:  # SystemExit and KeyboardInterrupt too
            self._end_copy()
            kind = "memory" if isinstance(error, MemoryError) else "raised"
            where = place(error) if kind == "raised" else ""  # which takes memory
            return [_void(kind, f"raised {type(error).__name__}: {said(error)}", where)] * len(samples)
        self._end_copy()
        if self._forks and _copy_came_back():
            return [_void("forked", "forked, and the new process came back from it")] * len(samples)
        return [self._read(number, one, sample) for one, sample in zip(found, samples, strict=True)]

    def _call(self, number: int, asked: Sample | Group) -> Any:
        found = self.functions[number](asked)
        if inspect.isawaitable(found):
            return self._loop.run_until_complete(_awaited(found))
        return found

    def _read(self, number: int, returned: Any, sample: Sample) -> Any:
        if isinstance(returned, Void):
            return _void(returned.reason, f"returned {returned.why}" if returned.why else "returned Void")
        of = self._task.functions[number]
        try:
            return read_outcome(returned, sample, self._task.weights, of.name, of.weight)
        except RewardError as error:
            return _void("returned", f"returned {error}")
        except BaseException as error:  # an object whose comparison or hash raises, SystemExit too
            self._end_copy()
            return _void("returned", f"returned what cannot be read ({type(error).__name__}: {said(error)})")

    def _end_copy(self) -> None:
        """Does not return in a process that the function forked; it must not clean up either."""
        if os.getpid() != self._process:
            os._exit(EXIT_COPY)


def _joined(answers: Sequence[Any], sample: Sample) -> Any:
    """What several functions say of a sample, as JSON: one without a reward leaves it without one."""
    void = next((one for one in answers if isinstance(one, dict)), None)
    if void is not None:
        return void
    try:
        found = join_outcomes(answers, sample)
    except RewardError as error:
        return _void("returned", f"returned {error}")
    return [found.reward, found.parts, found.turn_rewards]


async def _awaited(found: Any) -> Any:
    return await found


def _void(reason: str, why: str, where: str = "") -> dict[str, str]:
    return {"void": short(reason), "why": short(why) + where}


def _copy_came_back() -> bool:
    """Whether a child ended as a copy does. The exit status of another is left for whoever waits for it."""
    deadline = time.monotonic() + _COPY_SECONDS
    while time.monotonic() < deadline:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # the function has waited for all of them
            return False
        if ended is not None and ended.si_code == os.CLD_EXITED and ended.si_status == EXIT_COPY:
            os.waitpid(ended.si_pid, 0)
            return True
        time.sleep(0.005)
    return False


def _limit(memory: float) -> None:
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Answers until the trainer closes the connection, or ends."""
    parent, descriptor = map(int, sys.argv[1:])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had died before prctl
        sys.exit(f"process {parent}, which started this worker, has ended")
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    task: Task = pickle.loads(connection.recv_bytes())  # noqa: S301 from the process that started this one
    sys.path[:] = task.path or sys.path
    _limit(task.memory)
    if task.model is not None:
        os.environ[DIRECTORY] = str(task.model)
    os.environ |= {TIMEOUT: str(task.timeout), PROCESSES: str(task.processes)}
    try:
        scorer = _Scorer(task)
    except BaseException as error:  # what is wrong is said by the pool
        connection.send_bytes(json.dumps({"error": str(error)}).encode())
        return
    connection.send_bytes(json.dumps(scorer.of_group).encode())
    while True:
        try:
            numbers, asked = pickle.loads(connection.recv_bytes())  # noqa: S301
        except (EOFError, OSError):
            _leave()
        answer = scorer.score(numbers, asked)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the function may have closed it
            sys.stdout.flush()
        try:
            connection.send_bytes(json.dumps(answer).encode())
        except OSError:
            _leave()


def _leave() -> NoReturn:
    """Ends with every process of this session, which is this worker's own."""
    os.killpg(0, signal.SIGKILL)
    raise SystemExit
