"""Reward functions in processes of their own, so that what user code does to a process is not done to a rank.

A worker has one sample (or group) at a time. What raises, exits, hangs, takes too much memory, prints without
end or returns no reward makes its sample void; a worker that is lost is replaced. This is no sandbox: the
code runs with the user's rights.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Self

from mcore_rl.errors import ConfigError, ResourceError, RewardError
from mcore_rl.rewards.worker import Task
from mcore_rl.terminal import joined, printable, short
from mcore_rl.types import Group, RewardPart, Sample, TurnReward

PRINTED = 1 << 20
"""bytes that one call may print; more make its sample void"""
SHOWN = 1 << 14
"""bytes of it that are shown"""
START_SECONDS = 120.0
"""until a worker has imported the function"""
PATIENCE = 0.02
"""seconds without an answer after which one more worker is started, where there is work for it"""
_LOST_STARTS = 8
"""workers that may be lost while they start, where the function could be imported before"""
_EXAMPLES = 3


@dataclass
class Reasons:
    """Why samples are void, counted; and the first few of them in words."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, sample: str, why: str) -> None:
        """Count one sample."""
        self.counts[reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{sample} {why}")


def check_rate(scored: int, reasons: Sequence[Reasons], most: float, function: str) -> None:
    """Whether a run can go on with so many void samples; every rank calls it with the same.

    Raises:
        RewardError: on every rank, where more than `most` of the `scored` samples are void, or all of them.
    """
    counts = sum((part.counts for part in reasons), Counter())
    void = counts.total()
    if void and (void > most * scored or void == scored):
        what = joined(f"{reason}: {count}" for reason, count in counts.most_common())
        first = ", ".join([text for part in reasons for text in part.examples][:_EXAMPLES])
        raise RewardError(
            f"reward {function} gave {void} of {scored} samples no reward ({what}), and reward.max_void is "
            f"{most:g} of a step: {first}; handle these responses in the function, or raise reward.max_void"
        ).on_every_rank()


class _Worker:
    """One process, and the call that it is in."""

    def __init__(self, task: Task) -> None:
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        command = [sys.executable, "-m", "mcore_rl.rewards", str(os.getpid()), str(theirs.fileno())]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(task.path)}
        try:
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            os.close(read)
            raise
        finally:
            theirs.close()
            os.close(write)
        os.set_blocking(read, False)
        self.output = read
        self.connection = Connection(ours.detach())
        self.connection.send_bytes(pickle.dumps(task))
        self.ready = False
        self.of: tuple[int, Sample | Group] | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self.printed = 0
        self.prints = True
        """it has not closed its output"""

    def ask(self, number: int, asked: Sample | Group, seconds: float) -> None:
        """Begin a call."""
        self.of, self.printed = (number, asked), 0
        self.deadline = time.monotonic() + seconds
        self.connection.send_bytes(pickle.dumps(asked, pickle.HIGHEST_PROTOCOL))

    def drain(self) -> None:
        """Read what was printed, and show the beginning of it."""
        with contextlib.suppress(BlockingIOError):
            while self.printed <= PRINTED:
                text = os.read(self.output, 1 << 16)
                if not text:
                    self.prints = False
                    return
                shown = text[: max(0, SHOWN - self.printed)].decode(errors="replace").rstrip("\n")
                self.printed += len(text)
                if shown:
                    print(printable(shown), file=sys.stderr)

    def end(self) -> int:
        """Kill it with every process of its session; returns its exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        self.connection.close()
        os.close(self.output)
        return status


class RewardPool:
    """The workers of one replica's lead; none is started before the first sample.

    Start it from the thread that owns the process: Linux ends a worker with the thread that started it.

    Args:
        workers: processes, at most.
        timeout: seconds of one call of the function.
    """

    def __init__(self, task: Task, *, workers: int, timeout: float) -> None:
        self._task = replace(task, path=tuple(task.path or sys.path))
        self._most, self._timeout = workers, timeout
        self._workers: list[_Worker] = []
        self._of_group: bool | None = None
        self._lost_starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, and what they have started."""
        while self._workers:
            self._workers.pop().end()

    def score(self, groups: Sequence[Group]) -> tuple[list[Group], Reasons]:
        """The same groups with rewards; a sample that got none is void, and why is counted.

        Raises:
            ConfigError: the function cannot be loaded.
            RewardError: workers cannot be started. ResourceError: since something else kills them.
        """
        if not any(group.samples for group in groups):
            return list(groups), Reasons()
        try:
            self._start_first()
            asked: list[Sample | Group] = (
                [group for group in groups if group.samples]
                if self._of_group
                else [sample for group in groups for sample in group.samples]
            )
            answers = self._answers(asked)
        except BaseException:
            self.close()  # no answer of these calls may reach the next ones
            raise
        reasons = Reasons()
        found = {
            sample.id: _with_reward(sample, one, reasons)
            for its, answer in zip(asked, answers, strict=True)
            for sample, one in zip(_samples(its), answer, strict=True)
        }
        return [replace(g, samples=tuple(found[s.id] for s in g.samples)) for g in groups], reasons

    def _start_first(self) -> None:
        if not self._workers:
            self._workers.append(_Worker(self._task))
        while self._of_group is None:
            self._serve(0.1)

    def _answers(self, asked: Sequence[Sample | Group]) -> list[list[Any]]:
        """The answer to each; starts more workers while they find work."""
        answers: list[list[Any]] = [[] for _ in asked]
        left, missing = deque(enumerate(asked)), len(asked)
        heard = time.monotonic()
        while missing:
            for worker in self._workers:
                if left and worker.ready and worker.of is None:
                    try:
                        worker.ask(*left[0], self._timeout)
                        left.popleft()
                    except OSError:  # it has ended since its last answer: another one is asked
                        worker.of = None
            found = self._serve(PATIENCE)
            for number, answer in found:
                answers[number] = answer
            missing -= len(found)
            now = time.monotonic()
            starting = sum(not worker.ready for worker in self._workers)
            slow = not self._workers or (not found and now - heard > PATIENCE)
            if slow and starting < len(left) and len(self._workers) < self._most:
                self._workers.append(_Worker(self._task))
            heard = now if found else heard
        return answers

    def _serve(self, seconds: float) -> list[tuple[int, list[Any]]]:
        """Read what workers say within `seconds`; (number of what was asked, answers) of calls that ended."""
        now = time.monotonic()
        until = min([now + seconds, *(w.deadline for w in self._workers if w.of or not w.ready)])
        sources: list[Any] = [w.connection for w in self._workers]
        sources += [w.output for w in self._workers if w.prints]
        heard = set(wait(sources, max(0.0, until - now)))
        ended = []
        for worker in list(self._workers):
            if worker.output in heard:
                worker.drain()
            answer = self._heard(worker, worker.connection in heard)
            if answer is None:
                continue
            if worker.of is not None:
                ended.append((worker.of[0], answer))
            worker.of = None
        return ended

    def _heard(self, worker: _Worker, spoke: bool) -> list[Any] | None:
        """The answer of a worker's call, which may be that it is lost; None while it is in it."""
        if spoke:
            try:
                said = json.loads(worker.connection.recv_bytes())
            except (EOFError, OSError, ValueError):
                return self._lost(worker, "exited", "ended its process")
            if worker.ready:
                return said
            if "error" in said:
                raise ConfigError(said["error"])
            worker.ready, self._of_group = True, said["of_group"]
            return None
        if worker.printed > PRINTED:
            return self._lost(worker, "output", f"printed more than {PRINTED >> 20} MiB")
        if (worker.of or not worker.ready) and time.monotonic() > worker.deadline:
            return self._lost(worker, "timeout", f"gave no reward within {self._timeout:g} s")
        return None

    def _lost(self, worker: _Worker, reason: str, why: str) -> list[Any]:
        self._workers.remove(worker)
        worker.drain()
        status = worker.end()
        if not worker.ready:
            self._lost_starts += 1
            if self._of_group is not None and self._lost_starts <= _LOST_STARTS:
                return []  # others have imported the function: one more is started where there is work for it
            raise _no_start(self._task.function, killed=reason == "exited" and status == -signal.SIGKILL)
        if reason == "exited":
            why = f"{why} ({_how(status)})"
        samples = _samples(worker.of[1]) if worker.of else ()
        return [{"void": reason, "why": why} for _ in samples]


def _no_start(function: str, *, killed: bool) -> RewardError | ResourceError:
    """Why no worker of the function is there; one that was killed is worth a retry."""
    if killed:
        return ResourceError(
            f"a process of the reward function {function} was killed (SIGKILL) while it started: mostly by "
            "the kernel's out-of-memory killer, see dmesg; use less memory, or lower reward.workers"
        )
    return RewardError(
        f"a process of the reward function {function} ended or was not ready within {START_SECONDS:g} s; "
        "import its module by hand, or raise reward.memory"
    )


def _how(status: int) -> str:
    """The exit status of a process: a real-time signal has no name."""
    if status >= 0:
        return f"status {status}"
    return signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"


def _samples(asked: Sample | Group) -> tuple[Sample, ...]:
    return asked.samples if isinstance(asked, Group) else (asked,)


def _with_reward(sample: Sample, answer: Any, reasons: Reasons) -> Sample:
    if isinstance(answer, dict):
        reasons.add(short(answer["void"]), sample.id, short(answer["why"]))
        return replace(sample, reward=None, void=True)
    reward, parts, turns = answer
    return replace(
        sample,
        reward=float(reward),
        parts=tuple(RewardPart(*part) for part in parts),
        turn_rewards=tuple(TurnReward(*turn) for turn in turns),
    )
