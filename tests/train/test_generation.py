"""What becomes of groups in flight in a run that continues under another bound."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mcore_rl.checkpoint import Saved
from mcore_rl.errors import ConfigError
from mcore_rl.rollout.client import Reply
from mcore_rl.rollout.saved import is_too_old, reply_from_json, reply_to_json
from mcore_rl.rollout.schedule import Schedule
from mcore_rl.train.requests import check_saved
from mcore_rl.types import VersionSpan


def test_a_finished_sample_is_saved_as_it_trains_and_takes_11_bytes_a_token() -> None:
    """Numbers as text took 29 in the file, and 170 in the memory of every rank."""
    tokens, log_probs = np.arange(150_000, 154_000), np.linspace(-20, 0, 4000, dtype=np.float32)
    reply = Reply(
        *("a@1/0", tuple(tokens.tolist()), tuple(log_probs.tolist()), ()),
        *("stop", (VersionSpan("1", 0, 1000), VersionSpan("2", 1000, 4000))),
    )
    saved = json.dumps(reply_to_json(reply))
    assert len(saved) < 11 * 4000
    assert reply_from_json(json.loads(saved), routed=False) == reply


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("saved_after", [1, 2, 5])
def test_what_is_kept_is_trained_within_the_bound(before: int, after: int, saved_after: int) -> None:
    """Groups as `Generation` asks them, one a step, saved after some steps; two steps of the other bound."""
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


def checkpoint_with(*groups: str) -> Saved:
    return Saved(Path("step_2"), 2, {}, {"state": {"ahead": {"groups": [{"id": id} for id in groups]}}})


def test_groups_in_flight_are_refused_only_where_they_would_never_be_trained() -> None:
    sample = Saved(Path("step_2"), 2, {}, {"state": {}})
    for saved, bound in (
        (None, 0),
        (sample, 0),
        (checkpoint_with(), 0),
        (checkpoint_with(), 1),
        (checkpoint_with("p@3"), 1),
    ):
        check_saved(saved, bound)
    with pytest.raises(ConfigError, match=r"step_2 holds 1 groups.* in flight.*max_staleness of 1 or more"):
        check_saved(checkpoint_with("p@3"), 0)


def test_with_a_bound_of_0_a_step_asks_for_its_groups_and_leaves_none() -> None:
    schedule = Schedule(groups=2, extra=1, max_staleness=0)
    for step in (1, 2):
        names = [f"{step}{i}" for i in range(schedule.wanted(100))]
        assert len(names) == 3
        schedule.ask(names, step - 1)
        for name in names[1:]:
            schedule.finish(name)
        batch = schedule.take(step)
        assert batch is not None
        assert batch.trained == tuple(names[1:])
        assert batch.discarded == {names[0]: "unfinished"}
        assert schedule.in_flight == {}
