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

from mcore_rl.rollout.inflight import Queue, Schedule

SIZE = 8
"""samples of a group"""


class OneReplica:
    """A schedule and the queue that every rank has of it, as training/generation.py uses the two."""

    def __init__(self, *, groups: int, extra: int, max_staleness: int) -> None:
        self.schedule = Schedule(extra=extra, max_staleness=max_staleness)
        self.queue = Queue(groups=groups, extra=extra, max_staleness=max_staleness, replicas=1)
        self.groups, self.asked = groups, 0

    def ask(self, step: int, missing: int | None = None, steps: int = 9) -> list[str]:
        """Ask what is wanted, groups named by number."""
        count = self.queue.wanted(steps, self.groups if missing is None else missing)
        new = [str(number) for number in range(self.asked, self.asked + count)]
        self.asked += count
        self.queue.ask(new, [count])
        self.schedule.ask(new, step - 1)
        return new

    def take(self, count: int | None = None) -> tuple[str, ...] | None:
        """None as long as too few have finished."""
        (mine,) = self.queue.oldest(self.groups if count is None else count)
        taken = self.schedule.take(mine)
        self.queue.remove(taken or ())
        return taken

    def discard(self, step: int) -> dict[str, str]:
        discarded = self.schedule.discard(step)
        self.queue.remove(discarded)
        assert list(self.queue) == list(self.schedule.in_flight)
        return dict(discarded)


@given(data=st.data(), groups=st.integers(1, 4), extra=st.integers(0, 3), bound=st.integers(0, 3))
def test_every_group_is_trained_once_or_discarded_or_in_flight(data, groups, extra, bound) -> None:
    """Whatever order groups finish in, and however many are replaced: nothing too old, nothing twice."""
    one = OneReplica(groups=groups, extra=extra, max_staleness=bound)
    gone, seen = Counter(), {}
    running: list[str] = []
    for step in range(1, 8):
        missing = groups
        for refills in range(4):
            new = one.ask(step, missing)
            seen |= dict.fromkeys(new, step - 1)
            running += new
            while (taken := one.take(missing)) is None:
                one.schedule.finish(running.pop(data.draw(st.integers(0, len(running) - 1))))
            assert len(taken) == missing
            assert all(step - 1 - seen[group] <= bound for group in taken)
            gone.update(taken)
            missing = data.draw(st.integers(0, missing)) if refills < 3 else 0
            if not missing:
                break
        discarded = one.discard(step)
        running = [group for group in running if group not in discarded]
        gone.update(list(discarded))
        assert all(step - seen[group] <= bound for group in one.queue), "the next step may train it"
        assert set(gone.values()) <= {1}
        assert one.asked == gone.total() + len(one.queue)
        assert extra or not discarded


def test_without_extra_groups_a_step_trains_what_was_asked_for_it() -> None:
    one = OneReplica(groups=2, extra=0, max_staleness=1)
    assert one.ask(1) == ["0", "1", "2", "3"]
    for group in "320":
        one.schedule.finish(group)
    assert one.take() is None, "two have finished, of the next step"
    one.schedule.finish("1")
    assert one.take() == ("0", "1")
    assert one.discard(1) == {}
    assert one.ask(2) == ["4", "5"]
    assert one.take() == ("2", "3")


def test_what_is_replaced_comes_from_those_in_flight_and_as_many_are_asked() -> None:
    one = OneReplica(groups=3, extra=0, max_staleness=1)
    assert one.ask(1) == ["0", "1", "2", "3", "4", "5"]
    for group in "012345":
        one.schedule.finish(group)
    assert one.take() == ("0", "1", "2")
    assert one.ask(1, missing=2) == ["6", "7"]
    assert one.take(2) == ("3", "4"), "they had finished: the step waits for none"
    assert one.ask(2) == ["8", "9", "10"]
    assert list(one.queue) == ["5", "6", "7", "8", "9", "10"]


def test_the_early_stop_leaves_the_slowest_and_discards_what_is_too_old() -> None:
    one = OneReplica(groups=2, extra=2, max_staleness=1)
    assert len(one.ask(1)) == 6
    for group in "1520":
        one.schedule.finish(group)
    assert one.take() == ("1", "2"), "5 is of a later step, a finished third"
    assert one.discard(1) == {}
    assert list(one.queue) == ["0", "3", "4", "5"]
    assert one.ask(2) == ["6", "7"]
    assert one.take() == ("0", "5")
    assert one.discard(2) == {"3": "unfinished", "4": "unfinished"}
    assert one.ask(3) == ["8", "9", "10", "11"]
    for group in "687":
        one.schedule.finish(group)
    assert one.take() == ("6", "8")
    assert one.discard(3) == {"7": "stale"}


def test_nothing_is_asked_for_steps_that_will_not_come() -> None:
    queue = Queue(groups=2, extra=1, max_staleness=2, replicas=1)
    assert [queue.wanted(steps, missing=2) for steps in (9, 3, 2, 1)] == [7, 7, 5, 3]
    assert queue.wanted(1, missing=1) == 2


def test_a_replica_without_groups_never_waits() -> None:
    queue = Queue(groups=1, extra=0, max_staleness=0, replicas=2)
    counts = queue.spread(1)
    queue.ask(["a"], counts)
    assert queue.oldest(1) == counts == [1, 0]
    assert Schedule(extra=0, max_staleness=1).take(0) == ()


@given(data=st.data(), replicas=st.integers(1, 5))
def test_what_is_taken_does_not_depend_on_the_replicas(data, replicas) -> None:
    """Each takes so many of its own oldest: together they are the oldest of all; the shares stay level."""
    queue = Queue(groups=6, extra=0, max_staleness=1, replicas=replicas)
    own: list[list[str]] = [[] for _ in range(replicas)]
    for turn in range(6):
        count = queue.wanted(9, data.draw(st.integers(1, 6)))
        names = [f"{turn}.{i}" for i in range(count)]
        counts = queue.spread(count)
        queue.ask(names, counts)
        for mine, some in zip(own, counts, strict=True):
            mine += names[:some]
            names = names[some:]
        assert sorted(group for mine in own for group in mine) == sorted(queue)
        assert max(map(len, own)) - min(map(len, own)) <= 6, "a step's groups"
        oldest = list(queue)[: min(len(queue), data.draw(st.integers(1, 12)))]
        takes = queue.oldest(len(oldest))
        assert sorted(
            group for mine, some in zip(own, takes, strict=True) for group in mine[:some]
        ) == sorted(oldest)
        own = [mine[some:] for mine, some in zip(own, takes, strict=True)]
        queue.remove(oldest)


# -- a simulated clock ------------------------------------------------------------------------------------


@dataclass
class Simulation:
    """Servers that run `slots` samples at once, each for a lognormal draw, and a trainer beside them."""

    replica: OneReplica
    train: float
    """seconds of a training step"""
    spread: float
    """sigma of the latencies, whose mean is 1"""
    slots: int
    now: float = 0.0
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
        began = self.now
        for group in self.replica.ask(step):
            latencies = self.random.lognormal(-(self.spread**2) / 2, self.spread, SIZE)
            self.queue += [(group, float(latency)) for latency in latencies]
            self.missing[group] = SIZE
        asked_at = dict(self.replica.schedule.in_flight)
        self._fill()
        while (taken := self.replica.take()) is None:
            self._until(self.running[0][0])
        self.waits.append(self.now - began)
        self.ages |= {step - 1 - asked_at[group] for group in taken}
        discarded = self.replica.discard(step)
        self.discarded += len(discarded)
        self.queue = [entry for entry in self.queue if entry[0] not in discarded]
        self.running = [entry for entry in self.running if entry[1] not in discarded]
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
                self.replica.schedule.finish(group)
            self._fill()
        self.now = end


STEPS, GROUPS = 120, 32


@cache
def simulate(bound: int, train: float, spread: float, slots: int, extra: int = 0) -> tuple[float, Simulation]:
    made = Simulation(OneReplica(groups=GROUPS, extra=extra, max_staleness=bound), train, spread, slots)
    return made.run(STEPS), made


@pytest.mark.slow
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
    assert made.replica.asked == STEPS * GROUPS + made.discarded + len(made.replica.queue)
    assert 0 < made.discarded <= 8 * STEPS
