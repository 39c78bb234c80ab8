"""The scheduling of generation beside training, on a simulated clock: no server, no thread, no waiting."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.rollout.schedule import Batch, Schedule

SIZE = 8
"""samples of a group"""


def ask(schedule: Schedule, version: int, number: int) -> int:
    """Ask what is wanted, groups named by number from `number` on; the next number."""
    new = range(number, number + schedule.wanted(9))
    schedule.ask(map(str, new), version)
    return new.stop


@given(data=st.data(), groups=st.integers(1, 4), extra=st.integers(0, 3), bound=st.integers(1, 3))
def test_every_group_is_trained_once_or_discarded_or_in_flight(data, groups, extra, bound) -> None:
    """Whatever order groups finish in: nothing too old, nothing twice, and the counts add up."""
    schedule = Schedule(groups=groups, extra=extra, max_staleness=bound)
    asked, gone, seen = 0, Counter(), {}
    running: list[str] = []
    for step in range(1, 8):
        before = asked
        asked = ask(schedule, step - 1, asked)
        seen |= {str(i): step - 1 for i in range(before, asked)}
        running += map(str, range(before, asked))
        batch: Batch | None = None
        while batch is None:
            done = running.pop(data.draw(st.integers(0, len(running) - 1)))
            schedule.finish(done)
            batch = schedule.take(step)
        running = [group for group in running if group not in batch.discarded]
        gone.update([*batch.trained, *batch.discarded])
        assert len(batch.trained) == groups
        assert all(step - 1 - seen[group] <= bound for group in batch.trained)
        assert all(step - seen[group] <= bound for group in schedule.in_flight), "the next step may train it"
        assert set(gone.values()) <= {1}
        assert asked == gone.total() + len(schedule.in_flight)
        assert extra or not batch.discarded


def test_without_extra_groups_a_step_trains_what_was_asked_for_it() -> None:
    schedule = Schedule(groups=2, extra=0, max_staleness=1)
    schedule.ask("abcd", 0)
    for group in "dca":
        schedule.finish(group)
    assert schedule.take(1) is None, "two have finished, of the next step"
    schedule.finish("b")
    assert schedule.take(1) == Batch(("a", "b"), {})
    assert schedule.wanted(9) == 2
    assert schedule.take(2) == Batch(("c", "d"), {})


def test_the_early_stop_leaves_the_slowest_and_discards_what_is_too_old() -> None:
    schedule = Schedule(groups=2, extra=2, max_staleness=1)
    assert schedule.wanted(9) == 6
    schedule.ask("abcdef", 0)
    for group in "bfca":
        schedule.finish(group)
    assert schedule.take(1) == Batch(("b", "c"), {}), "f is of a later step, a finished third"
    assert list(schedule.in_flight) == ["a", "d", "e", "f"]
    schedule.ask("gh", 1)
    assert schedule.take(2) == Batch(("a", "f"), {"d": "unfinished", "e": "unfinished"})
    schedule.ask("ijkl", 2)
    schedule.finish("g")
    schedule.finish("i")
    schedule.finish("h")
    assert schedule.take(3) == Batch(("g", "i"), {"h": "stale"})


def test_nothing_is_asked_for_steps_that_will_not_come() -> None:
    schedule = Schedule(groups=2, extra=1, max_staleness=2)
    assert [schedule.wanted(steps) for steps in (9, 3, 2, 1)] == [7, 7, 5, 3]


def test_a_replica_without_groups_never_waits() -> None:
    schedule = Schedule(groups=0, extra=0, max_staleness=1)
    assert schedule.wanted(9) == 0
    assert schedule.take(1) == Batch((), {})


# -- a simulated clock ------------------------------------------------------------------------------------


@dataclass
class Simulation:
    """Servers that run `slots` samples at once, each for a lognormal draw, and a trainer beside them."""

    schedule: Schedule
    train: float
    """seconds of a training step"""
    spread: float
    """sigma of the latencies, whose mean is 1"""
    slots: int
    now: float = 0.0
    asked: int = 0
    queue: list[tuple[str, float]] = field(default_factory=list)
    running: list[tuple[float, str]] = field(default_factory=list)
    missing: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    """[steps] from asking to the batch"""
    discarded: int = 0
    ages: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(0)

    def run(self, steps: int) -> float:
        """Seconds per step, without the first quarter."""
        ends = [self.step(step) for step in range(1, steps + 1)]
        return (ends[-1] - ends[steps // 4]) / (steps - 1 - steps // 4)

    def step(self, step: int) -> float:
        before, began = self.asked, self.now
        self.asked = ask(self.schedule, step - 1, self.asked)
        for group in map(str, range(before, self.asked)):
            latencies = self.random.lognormal(-(self.spread**2) / 2, self.spread, SIZE)
            self.queue += [(group, float(latency)) for latency in latencies]
            self.missing[group] = SIZE
        asked_at = dict(self.schedule.in_flight)
        self._fill()
        while (batch := self.schedule.take(step)) is None:
            self._until(self.running[0][0])
        self.waits.append(self.now - began)
        self.ages |= {step - 1 - asked_at[group] for group in batch.trained}
        self.discarded += len(batch.discarded)
        self.queue = [entry for entry in self.queue if entry[0] not in batch.discarded]
        self.running = [entry for entry in self.running if entry[1] not in batch.discarded]
        heapq.heapify(self.running)
        self._until(self.now + self.train)
        return self.now

    def _fill(self) -> None:
        while self.queue and len(self.running) < self.slots:
            group, latency = self.queue.pop(0)
            heapq.heappush(self.running, (self.now + latency, group))

    def _until(self, end: float) -> None:
        self._fill()
        while self.running and self.running[0][0] <= end:
            self.now, group = heapq.heappop(self.running)
            self.missing[group] -= 1
            if not self.missing[group]:
                self.schedule.finish(group)
            self._fill()
        self.now = end


STEPS, GROUPS = 120, 32


@cache
def simulate(bound: int, train: float, spread: float, slots: int, extra: int = 0) -> tuple[float, Simulation]:
    made = Simulation(Schedule(groups=GROUPS, extra=extra, max_staleness=bound), train, spread, slots)
    return made.run(STEPS), made


@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.0, 1.25, 2.0])
@pytest.mark.parametrize(("spread", "slots"), [(0.5, 128), (0.5, 1024), (1.0, 128)])
def test_a_step_takes_as_long_as_the_longer_of_generation_and_training(spread, slots, ratio) -> None:
    """Within 5 %, where one after the other (bound 0: the negative control) takes their sum.

    Generation is as long as the batch's slowest sample and varies from step to step. A bound of 2 evens that
    out: max(mean generation, training). A bound of 1 cannot, since no batch may be asked before the step
    before last is published: mean(max(generation, training)).
    """
    _, alone = simulate(0, 0.0, spread, slots)
    generation = alone.waits[STEPS // 4 + 1 :]
    train = ratio * fmean(generation)
    longer = max(fmean(generation), train)
    two, one, zero = (simulate(bound, train, spread, slots) for bound in (2, 1, 0))
    assert two[0] <= 1.05 * longer
    assert one[0] <= 1.05 * fmean(max(seconds, train) for seconds in generation)
    assert zero[0] > 1.4 * longer
    assert [max(made.ages) for _, made in (two, one, zero)] == [2, 1, 0]
    assert one[1].discarded == two[1].discarded == 0


def test_extra_groups_buy_speed_for_discarded_samples() -> None:
    """With heavy tails: a step does not wait for the slowest samples; what it leaves behind is counted."""
    plain, _ = simulate(1, 4.0, 1.0, 512)
    early, made = simulate(1, 4.0, 1.0, 512, 8)
    assert early < 0.6 * plain
    assert max(made.ages) == 1
    assert made.asked == STEPS * GROUPS + made.discarded + len(made.schedule.in_flight)
    assert 0 < made.discarded <= 8 * STEPS
