"""What becomes of samples in flight in a run that continues under another bound."""

from __future__ import annotations

import pytest

from mcore_rl.rollout.schedule import Schedule
from mcore_rl.train.ahead import is_too_old


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("saved_after", [1, 2, 5])
def test_what_is_kept_is_trained_within_the_bound(before: int, after: int, saved_after: int) -> None:
    """Groups as `Ahead` asks them, one a step, saved after some steps; then two steps of the other bound."""
    schedule = Schedule(groups=1, extra=0, max_staleness=before)
    for step in range(1, saved_after + 1):
        for _ in range(schedule.wanted(100)):
            name = max([step - 1, *(int(id[2:]) for id in schedule.in_flight)]) + 1
            schedule.ask([f"p@{name}"], step - 1)
            schedule.finish(f"p@{name}")
        assert schedule.take(step) is not None
    saved = [{"id": id, "version": version} for id, version in schedule.in_flight.items()]
    assert len(saved) == before, "all that is in flight for the steps to come"

    kept = [group for group in saved if not is_too_old(group, saved_after, after)]
    if before <= after:
        assert kept == saved, "an equal bound keeps what had finished"
    for group in kept:
        step = int(group["id"][2:])
        assert step - 1 - group["version"] <= after
    if after < before < saved_after:
        assert kept == [], "the control: each was asked as early as the bound allowed"
