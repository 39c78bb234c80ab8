"""What becomes of groups in flight in a run that continues under another bound."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mcore_rl.checkpoint import Saved
from mcore_rl.errors import ConfigError, DamagedCheckpointError
from mcore_rl.rollout.experts import to_json
from mcore_rl.rollout.inflight import Queue, Schedule
from mcore_rl.rollout.reply import Reply
from mcore_rl.rollout.saved import check_group, is_too_old, reply_from_json, reply_to_json
from mcore_rl.training.requests import check_saved
from mcore_rl.types import ExpertLayers, VersionSpan


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


OF_MODEL = ExpertLayers(experts=4, per_token=2, sparse=(True,))


def in_flight(**fields: object) -> dict:
    """A group of a checkpoint with one finished sample of 3 tokens, `fields` of which are others."""
    reply = Reply("a@1/0", (1, 2, 3), (-1.0, -2.0, -0.5), (), "stop", (VersionSpan("1", 0, 3),))
    saved = reply_to_json(replace(reply, experts=np.array([[[0, 1]], [[2, 3]]], np.uint8)))
    arrays = {name: to_json(value) for name, value in fields.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in fields.items() if name not in arrays}
    return json.loads(json.dumps({"id": "a@1", "version": 1, "replies": [saved | rest | arrays]}))


def test_a_sample_in_flight_of_this_model_is_taken_from_a_checkpoint() -> None:
    check_group(in_flight(), 320, OF_MODEL)
    check_group(in_flight(), 320, None)
    check_group({"id": "a@1", "version": 1, "replies": None}, 320, OF_MODEL)


@pytest.mark.parametrize(
    "fields",
    [
        {"token_ids": np.array([1, 320, 3], np.int32)},
        {"token_ids": np.array([1, -2, 3], np.int32)},
        {"token_ids": np.array([1.5, 2, 3], np.float32)},
        {"token_ids": np.array([1, 2], np.int32)},
        {"log_probs": np.array([-1, np.nan, -1], np.float32)},
        {"log_probs": np.array([-1, 0.5, -1], np.float32)},
        {"log_probs": np.array([-1, -np.inf, -1], np.float32)},
        {"experts": np.array([[[0, 1]], [[2, 4]]], np.uint8)},
        {"experts": np.array([[[0, 1]], [[2, 2]]], np.uint8)},
        {"experts": np.zeros((2, 2, 2), np.uint8)},
        {"versions": [{"version": "1", "start": 0, "end": 2}]},
        {"versions": [{"version": 1, "start": 0, "end": 3}]},
        {"versions": [{"version": "1", "start": 0, "stop": 3}]},
        {"token_ids": None},
        {"token_ids": {"dtype": "int32", "shape": [3], "base64": "AAAA"}},
        {"token_ids": {"dtype": "object", "shape": [3], "base64": "AAAA"}},
    ],
)
def test_a_sample_in_flight_that_no_model_of_this_vocabulary_sampled_is_a_damaged_checkpoint(
    fields: dict,
) -> None:
    """On every rank alike: all of them read all groups."""
    with pytest.raises(DamagedCheckpointError, match="sample in flight a@1 is none of this model") as refused:
        check_group(in_flight(**fields), 320, OF_MODEL)
    assert refused.value.shared


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("saved_after", [1, 2, 5])
def test_what_is_kept_is_trained_within_the_bound(before: int, after: int, saved_after: int) -> None:
    """Groups as `Generation` asks them, one a step, saved after some steps; two steps of the other bound."""
    schedule = Schedule(extra=0, max_staleness=before)
    queue = Queue(groups=1, extra=0, max_staleness=before, replicas=1)
    for step in range(1, saved_after + 1):
        for _ in range(queue.wanted(100, missing=1)):
            name = max([step - 1, *(int(id[2:]) for id in queue)]) + 1
            queue.ask([f"p@{name}"], [1])
            schedule.ask([f"p@{name}"], step - 1)
            schedule.finish(f"p@{name}")
        taken = schedule.take(1)
        assert taken is not None
        queue.remove(taken)
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
    in_flight = [{"id": id, "version": 2, "replies": None} for id in groups]
    return Saved(Path("step_2"), 2, {}, {"state": {"ahead": {"groups": in_flight}}})


def test_groups_in_flight_are_refused_only_where_they_would_never_be_trained() -> None:
    sample = Saved(Path("step_2"), 2, {}, {"state": {}})
    for saved, bound in (
        (None, 0),
        (sample, 0),
        (checkpoint_with(), 0),
        (checkpoint_with(), 1),
        (checkpoint_with("p@3"), 1),
    ):
        check_saved(saved, bound, 320, None)
    with pytest.raises(ConfigError, match=r"step_2 holds 1 groups.* in flight.*max_staleness of 1 or more"):
        check_saved(checkpoint_with("p@3"), 0, 320, None)


def test_with_a_bound_of_0_a_step_asks_for_its_groups_and_leaves_none() -> None:
    schedule = Schedule(extra=1, max_staleness=0)
    for step in (1, 2):
        names = [f"{step}{i}" for i in range(3)]
        schedule.ask(names, step - 1)
        for name in names[1:]:
            schedule.finish(name)
        assert schedule.take(2) == tuple(names[1:])
        assert schedule.discard(step) == {names[0]: "unfinished"}
        assert schedule.in_flight == {}


@pytest.mark.parametrize(
    "group",
    [
        {"id": "a@1", "version": 1, "replies": [None]},
        {"id": "a@1", "version": 1, "replies": {"a": 1}},
        {"id": "a@1", "version": "1", "replies": None},
        {"id": "a", "version": 1, "replies": None},
        {"id": None, "version": 1, "replies": None},
        in_flight(finish_reason="because"),
        {"id": "k" * 50_000, "version": 1, "replies": None},
    ],
    ids=lambda group: f"{group['id']} {group['replies']}"[:30],
)
def test_a_group_in_flight_of_another_form_is_a_damaged_checkpoint(group: dict) -> None:
    with pytest.raises(DamagedCheckpointError, match="is none of this model") as refused:
        check_group(group, 320, None)
    assert len(str(refused.value)) < 600
