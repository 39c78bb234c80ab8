"""The processes of a reward pool and their calls: who is asked what, and what each of them says.

One thread has them. What user code does to a process ends its call, never this one.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from mcore_rl.errors import ConfigError, McoreRLError, ResourceError, RewardError
from mcore_rl.rewards.outcome import Outcome
from mcore_rl.rewards.process import PRINTED, START_SECONDS, RewardProcess
from mcore_rl.rewards.task import Task
from mcore_rl.terminal import joined
from mcore_rl.types import Group, RewardPart, Sample, TurnReward

PATIENCE = 0.02
"""seconds without an answer after which one more worker is started, where there is work for it"""
_ENDED = "ended its process"
_LOST_STARTS = 8
"""workers that may be lost while they start, where the function could be imported before"""


@dataclass(eq=False)
class Scoring:
    """A group on its way through the workers."""

    make: Callable[[], Group]
    group: Group | None = None
    missing: int = 0
    """calls without an answer"""
    answers: dict[str, list[Any]] = field(default_factory=dict)
    """sample -> what each call said of it"""
    done: bool = False
    wanted: bool = True
    """nobody has forgotten it"""


class _Call(NamedTuple):
    of: Scoring
    functions: list[int]
    """by their number in the task"""
    asked: Sample | Group


class Workers:
    """The processes and their calls, for the thread of a pool."""

    def __init__(self, task: Task, most: int, bell: int) -> None:
        self._task, self._most, self._bell = task, most, bell
        self._workers: list[RewardProcess] = []
        self._waiting: list[Scoring] = []
        """until the first worker has said which functions are of groups"""
        self._left: deque[_Call] = deque()
        self._of_group: list[bool] | None = None
        self._lost_starts = 0
        self._heard_at = time.monotonic()
        self._finished = False

    def take(self, scoring: Scoring) -> None:
        """A group is to be scored."""
        if not scoring.wanted:
            return
        scoring.group = scoring.make()
        scoring.answers = {sample.id: [] for sample in scoring.group.samples}
        if not unscored(scoring.group).samples:
            scoring.done = self._finished = True
        else:
            self._waiting.append(scoring)

    def end(self) -> None:
        """End all of them."""
        while self._workers:
            self._workers.pop().end()

    def go_on(self) -> bool:
        """Ask who is free, and read what is said for a while; whether a group has its rewards now."""
        if self._waiting and self._of_group is None and not self._workers:
            self._start_one()
        if self._of_group is not None:
            waiting, self._waiting = self._waiting, []
            for scoring in waiting:
                self._plan(scoring, self._of_group)
        self._ask()
        if not self._finished:
            self._serve()
        finished, self._finished = self._finished, False
        return finished

    def _plan(self, scoring: Scoring, of_group: Sequence[bool]) -> None:
        """The calls of a group: one for all functions of a sample, one for those of the group."""
        assert scoring.group is not None
        group = unscored(scoring.group)
        prompt = group.samples[0].prompt
        apply = [k for k, one in enumerate(self._task.functions) if one.applies(prompt)]
        of_sample = [k for k in apply if not of_group[k]]
        calls = [_Call(scoring, of_sample, sample) for sample in group.samples if of_sample]
        if whole := [k for k in apply if of_group[k]]:
            calls.append(_Call(scoring, whole, group))
        scoring.missing = len(calls)
        self._left += calls
        if not apply:
            self._answer(
                _Call(scoring, [], group), _void(group, "no_function", self._task.no_function(prompt))
            )

    def _ask(self) -> None:
        if not any(worker.of for worker in self._workers):
            self._heard_at = time.monotonic()
        for worker in self._workers:
            while self._left and not self._left[0].of.wanted:
                self._left.popleft()
            if self._left and not worker.busy:
                call = self._left[0]
                with suppress(OSError):  # it has ended since its last answer: another one is asked
                    worker.ask(call, (call.functions, call.asked), self._task.timeout)
                    self._left.popleft()

    def _start_one(self) -> None:
        self._workers.append(RewardProcess(self._task))

    def _serve(self) -> None:
        """Read what workers say within some time, and start one more where that finds work."""
        now = time.monotonic()
        seconds = [w.deadline - now for w in self._workers if w.busy]
        if self._left and len(self._workers) < self._most:
            seconds.append(PATIENCE)
        sources: list[Any] = [self._bell, *(w.socket for w in self._workers)]
        sources += [w.output for w in self._workers if w.prints]
        heard = set(wait(sources, max(0.0, min(seconds)) if seconds else None))
        if self._bell in heard:
            with suppress(BlockingIOError):
                os.read(self._bell, 1 << 16)
        answered = False
        for worker in list(self._workers):
            if worker.output in heard:
                worker.drain()
            answered |= self._hear(worker, worker.socket in heard)
        now = time.monotonic()
        starting = sum(not worker.ready for worker in self._workers)
        slow = not self._workers or now - self._heard_at > PATIENCE
        if answered:
            self._heard_at = now
        elif slow and starting < len(self._left) and len(self._workers) < self._most:
            self._start_one()

    def _hear(self, worker: RewardProcess, spoke: bool) -> bool:
        """Whether a call of the worker has ended, which may be since it is lost."""
        if spoke:
            try:
                answers = worker.hear()
                for said in answers:
                    self._read(worker, said)
            except McoreRLError:
                raise
            except (EOFError, OSError):
                return self._lost(worker, "exited", _ENDED)
            except (ValueError, RecursionError):
                return self._lost(worker, "exited", "wrote into its connection to the trainer")
            return bool(answers)
        if worker.printed > PRINTED:
            return self._lost(worker, "output", f"printed more than {PRINTED >> 20} MiB")
        if worker.busy and time.monotonic() > worker.deadline:
            return self._lost(worker, "timeout", f"gave no reward within {self._task.timeout:g} s")
        return False

    def _read(self, worker: RewardProcess, said: Any) -> None:
        """One message of a worker. Raises ValueError where it is none: user code can reach the connection."""
        if worker.ready:
            if worker.of is None:
                raise ValueError("an answer to nothing")
            answers = list(_checked(said, len(_samples(worker.of.asked))))
            call, worker.of = worker.of, None
            self._answer(call, answers)
        elif isinstance(said, dict) and "error" in said:
            raise ConfigError(str(said["error"]))
        elif isinstance(said, list) and len(said) == len(self._task.functions):
            self._of_group, worker.ready = [bool(one) for one in said], True
        else:
            raise ValueError("no beginning")

    def _answer(self, call: _Call, answers: Sequence[Any]) -> None:
        scoring = call.of
        for sample, answer in zip(_samples(call.asked), answers, strict=True):
            scoring.answers[sample.id].append(answer)
        scoring.missing -= 1
        if scoring.missing <= 0:
            scoring.done = self._finished = True

    def _lost(self, worker: RewardProcess, reason: str, why: str) -> bool:
        self._workers.remove(worker)
        worker.drain()
        status = worker.end()
        if not worker.ready:
            self._lost_starts += 1
            if self._of_group is not None and self._lost_starts <= _LOST_STARTS:
                return False  # others have imported the function: one more is started where there is work
            names = joined(one.function for one in self._task.functions)
            raise _no_start(names, killed=why == _ENDED and status == -signal.SIGKILL)
        if why == _ENDED:
            why = f"{why} ({_how(status)})"
        if worker.of is not None:
            self._answer(worker.of, _void(worker.of.asked, reason, why))
        return worker.of is not None


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


def unscored(group: Group) -> Group:
    """The samples of a group that its environment has neither given a reward nor made void."""
    left = tuple(sample for sample in group.samples if sample.reward is None and not sample.void)
    return group if len(left) == len(group.samples) else replace(group, samples=left)


def _samples(asked: Sample | Group) -> tuple[Sample, ...]:
    return asked.samples if isinstance(asked, Group) else (asked,)


def _void(asked: Sample | Group, reason: str, why: str) -> list[dict[str, str]]:
    return [{"void": reason, "why": why} for _ in _samples(asked)]


def _checked(said: Any, samples: int) -> Iterator[Any]:
    """The answer for each sample, void or an Outcome. Raises ValueError where it is none."""
    if not isinstance(said, list) or len(said) != samples:
        raise ValueError("no answer for each sample")
    for one in said:
        if isinstance(one, dict) and isinstance(one.get("void"), str) and isinstance(one.get("why"), str):
            yield one
            continue
        try:
            reward, parts, turns = one
            found = Outcome(
                float(reward),
                tuple(RewardPart(str(name), float(value), float(weight)) for name, value, weight in parts),
                tuple(TurnReward(int(token), float(value)) for token, value in turns),
            )
        except (TypeError, OverflowError) as error:
            raise ValueError("no outcome") from error
        if not math.isfinite(found.reward):
            raise ValueError("no finite reward")
        yield found
