"""Tokens that are too old are context, and everything else of a rollout stays as it was sampled."""

from __future__ import annotations

import numpy as np

from mcore_rl.rewards.outcome import turn_ends
from mcore_rl.training.stale_tokens import stale_tokens, without_stale_tokens
from mcore_rl.types import Group, Prompt, Sample, Segment, TurnReward, VersionSpan

PROMPT = Prompt("p", "", (1, 2), "")


def segment(count: int, *spans: VersionSpan, trained: list[bool] | None = None) -> Segment:
    length = count if trained is None else len(trained)
    mask = None if trained is None else np.array(trained)
    scores = -np.arange(1, count + 1, dtype=np.float32)
    return Segment(np.array([1, 2], np.int32), np.arange(length, dtype=np.int32), scores, spans, mask)


def sample() -> Sample:
    """Two segments: of versions 3 and 4 with an observation between, and of 5 alone."""
    seen = [True, True, False, False, True, True]
    first = segment(4, VersionSpan("3", 0, 1), VersionSpan("4", 1, 4), trained=seen)
    second = segment(3, VersionSpan("5", 0, 3))
    turns = (TurnReward(1, 0.5), TurnReward(3, 1.0), TurnReward(6, 2.0))
    made = Sample("p@1/0", PROMPT, (first, second), "", "stop", reward=3.5, turn_rewards=turns)
    assert turn_ends(made) == (1, 3, 6)
    return made


def bounded(oldest: int) -> Sample:
    group = Group("p@1", (sample(),))
    kept = without_stale_tokens(group, oldest)
    (one,) = kept.samples
    assert stale_tokens(group, kept) == sample().trained_tokens - (0 if one.void else one.trained_tokens)
    return one


def test_a_bound_that_no_token_passes_changes_nothing() -> None:
    group = Group("p@1", (sample(),))
    assert without_stale_tokens(group, 3).samples[0] is group.samples[0]


def test_tokens_of_older_versions_are_context() -> None:
    one = bounded(4)
    first, second = one.segments
    assert first.trained is not None
    assert first.trained.tolist() == [False, True, False, False, True, True]
    assert np.asarray(first.log_probs).tolist() == [-2.0, -3.0, -4.0]
    assert first.versions == (VersionSpan("4", 0, 3),)
    assert first.token_ids.tolist() == [*range(6)], "they stay what later tokens were sampled after"
    assert second.trained is None
    assert one.turn_rewards == (TurnReward(0, 0.5), TurnReward(2, 1.0), TurnReward(5, 2.0))
    assert (one.reward, one.void) == (3.5, False)


def test_a_segment_without_a_token_is_none_and_a_sample_without_a_segment_is_void() -> None:
    one = bounded(5)
    assert [len(part.log_probs) for part in one.segments] == [3]
    assert one.turn_rewards == (TurnReward(2, 2.0),)
    none = bounded(6)
    assert (none.void, none.reward) == (True, None)
    assert none.failure is not None
    assert none.failure[0] == "stale"
