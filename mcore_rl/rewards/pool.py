"""Reward functions in processes of their own, so that what user code does to a process is not done to a rank.

A worker has one sample (or group) at a time. What raises, exits, hangs, takes too much memory, prints without
end or returns no reward makes its sample void; a worker that is lost is replaced. This is no sandbox: the
code runs with the user's rights.

A thread of the pool has the workers, so that groups are scored while the thread that asks for them waits for
more, or trains.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Self

from mcore_rl.errors import RewardError
from mcore_rl.rewards.outcome import join_outcomes
from mcore_rl.rewards.task import Task
from mcore_rl.rewards.workers import Scoring, Workers
from mcore_rl.terminal import QUOTED_CHARS, escaped, joined, short
from mcore_rl.types import Group, Sample
from mcore_rl.user_code import MOST_CHARS

_CLOSE_SECONDS = 30.0
_EXAMPLES = 3
_WHY_CHARS = 2 * QUOTED_CHARS + MOST_CHARS


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


class RewardPool:
    """The workers of one replica's lead; none is started before the first sample.

    Args:
        workers: processes, at most. The task says how long a call may take.
    """

    def __init__(self, task: Task, *, workers: int) -> None:
        self._task = replace(task, path=tuple(task.path or sys.path))
        self._most = workers
        self._changed = threading.Condition()
        self._scorings: dict[str, Scoring] = {}
        """of all groups that were begun and neither finished nor forgotten"""
        self._arrived: list[Scoring] = []
        """begun, and not seen by the thread yet"""
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._bell = -1, -1
        """(read, write) ends of a pipe that wakes the thread"""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- what other threads call --------------------------------------------------------------------------

    def begin(self, name: str, make: Callable[[], Group]) -> None:
        """The group of that name is scored from now on; `make` makes it, on the thread of the pool."""
        with self._changed:
            scoring = Scoring(make)
            self._scorings[name] = scoring
            self._arrived.append(scoring)
            if self._thread is None:
                self._start()
            else:
                self._ring()

    def finish(self, names: Sequence[str]) -> tuple[list[Group], Reasons]:
        """These groups, which were begun, with rewards, waiting for them.

        A sample that got no reward is void, and why is counted.

        Raises:
            ConfigError: the function cannot be loaded.
            RewardError: workers cannot be started. ResourceError: since something else kills them.
        """
        with self._changed:
            scorings = [self._scorings[name] for name in names]
            while self._error is None and not all(scoring.done for scoring in scorings):
                self._changed.wait(1.0)  # every call has a deadline
            error = self._error
            for name in names:
                self._scorings.pop(name, None)
        if error is not None:
            self.close()  # no answer of these calls may reach the next ones
            raise error
        reasons = Reasons()
        return [_with_rewards(scoring, reasons) for scoring in scorings], reasons

    def forget(self, names: Sequence[str]) -> None:
        """Nobody will ask for these groups, some of which may not have been begun."""
        with self._changed:
            for name in names:
                if name in self._scorings:
                    self._scorings.pop(name).wanted = False

    def score(self, groups: Sequence[Group]) -> tuple[list[Group], Reasons]:
        """Begin and finish these groups."""
        names = [group.id for group in groups]
        try:
            for group in groups:
                self.begin(group.id, lambda group=group: group)
            return self.finish(names)
        except BaseException:
            self.forget(names)
            raise

    def close(self) -> None:
        """End all workers, and what they have started."""
        with self._changed:
            thread, self._closing = self._thread, True
            if thread is not None:
                self._ring()
        if thread is not None:
            thread.join(_CLOSE_SECONDS)
        with self._changed:
            for end in self._bell:
                if end >= 0:
                    os.close(end)
            self._bell = -1, -1
            self._thread, self._closing, self._error = None, False, None
            self._scorings.clear()
            self._arrived.clear()

    def _start(self) -> None:
        self._bell = os.pipe()
        for end in self._bell:
            os.set_blocking(end, False)
        # Linux ends a worker with the thread that started it, which must live as long as the pool.
        self._thread = threading.Thread(target=self._run, name="mcore_rl-rewards", daemon=True)
        self._thread.start()

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # it has not heard the last thousands yet
            os.write(self._bell[1], b"\0")

    # -- on the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        workers = Workers(self._task, self._most, self._bell[0])
        try:
            while True:
                with self._changed:
                    if self._closing:
                        return
                    arrived, self._arrived = self._arrived, []
                for scoring in arrived:
                    workers.take(scoring)
                if workers.go_on():
                    with self._changed:
                        self._changed.notify_all()
        except BaseException as error:  # raised by the next `finish`: this thread has no caller
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            workers.end()


def _with_rewards(scoring: Scoring, reasons: Reasons) -> Group:
    assert scoring.group is not None
    samples = (_with_reward(sample, scoring.answers[sample.id], reasons) for sample in scoring.group.samples)
    return replace(scoring.group, samples=tuple(samples))


def _with_reward(sample: Sample, answers: Sequence[Any], reasons: Reasons) -> Sample:
    """One function without a reward leaves the sample without one: the sum of the rest is another reward.

    What its environment said of a sample stays.
    """
    if sample.void or sample.reward is not None:
        if sample.failure is not None:
            reasons.add(sample.failure[0], sample.id, sample.failure[1])
        return replace(sample, failure=None)
    void = next((one for one in answers if isinstance(one, dict)), None)
    if void is None:
        try:
            found = join_outcomes(answers, sample)
        except RewardError as error:
            void = {"void": "returned", "why": f"returned {error}"}
        else:
            return replace(sample, reward=found.reward, parts=found.parts, turn_rewards=found.turn_rewards)
    reasons.add(short(void["void"]), sample.id, escaped(void["why"])[:_WHY_CHARS])
    return replace(sample, reward=None, void=True)
