"""Groups as columns: the same groups again, and few bytes for a token."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.data_plane import bytes_per_token, hand_over, random_groups
from mcore_rl.rollout.columns import pack_groups, unpack_groups
from mcore_rl.types import Group, Prompt, RewardPart, Sample, TurnReward, VersionSpan

PROMPTS = {name: Prompt(name, "", (1, 2, 3), "") for name in "ab"}


def sample(id: str, prompt: str, n: int, reward: float | None = 0.5) -> Sample:
    spans = (VersionSpan("3", 0, n // 2), VersionSpan("4", n // 2, n))
    tokens, log_probs = np.arange(n, dtype=np.int32) + n, -np.arange(n, dtype=np.float32) / 7
    return Sample.of_response(id, PROMPTS[prompt], tokens, log_probs, "text", "length", spans, reward)


GROUPS = [
    Group("b@4", (sample("b@4/0", "b", 3), sample("b@4/2", "b", 0, None))),
    Group("a@4", ()),
    Group("a@5", (sample("a@5/1", "a", 5, -1.0),)),
]


def test_groups_come_back_without_their_texts() -> None:
    got = unpack_groups(pack_groups(GROUPS), PROMPTS)
    assert [(group.id, len(group.samples)) for group in got] == [("b@4", 2), ("a@4", 0), ("a@5", 1)]
    for group, wanted in zip(got, GROUPS, strict=True):
        for one, other in zip(group.samples, wanted.samples, strict=True):
            assert one.prompt is other.prompt
            assert (one.id, one.finish_reason) == (other.id, other.finish_reason)
            assert [s.versions for s in one.segments] == [s.versions for s in other.segments]
            assert (one.reward, one.text) == (other.reward, "")
            assert np.array_equal(one.token_ids, other.token_ids)
            assert np.array_equal(one.log_probs, other.log_probs)


def test_parts_and_turns_of_a_reward_come_too() -> None:
    parts, turns = (RewardPart("a", 1.0, 0.5), RewardPart("b", 2.0, 1.0)), (TurnReward(1, 0.5),)
    groups = [replace(GROUPS[0], samples=(*GROUPS[0].samples, replace(GROUPS[0].samples[0], void=True)))]
    groups[0] = replace(groups[0], samples=tuple(replace(s, parts=parts) for s in groups[0].samples))
    groups.append(Group("a@5", (replace(GROUPS[2].samples[0], turn_rewards=turns), *GROUPS[2].samples)))
    got = [s for group in hand_over(groups, PROMPTS) for s in group.samples]
    assert [(s.parts, s.turn_rewards, s.void) for s in got] == [
        (parts, (), False),
        (parts, (), False),
        (parts, (), True),
        ((), turns, False),
        ((), (), False),
    ]
    assert got[0].parts[0].weight == 0.5
    assert got[3].turn_rewards[0].token == 1


def test_what_every_rank_gets_is_read_only() -> None:
    got = unpack_groups(pack_groups(GROUPS), PROMPTS)
    for one in (sample for group in got for sample in group.samples):
        assert not one.log_probs.flags.writeable  # pyright: ignore[reportAttributeAccessIssue]
        assert not one.token_ids.flags.writeable  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(ValueError, match="read-only"):
            one.token_ids[:] = 3  # pyright: ignore[reportIndexIssue]


def test_nothing_comes_back_as_nothing() -> None:
    assert unpack_groups(pack_groups([]), PROMPTS) == []


def test_a_token_takes_at_most_nine_bytes() -> None:
    groups, prompts = random_groups(samples=16, tokens=512)
    assert bytes_per_token(groups) <= 9.0
    got = hand_over(groups, prompts)
    for group, wanted in zip(got, groups, strict=True):
        for one, other in zip(group.samples, wanted.samples, strict=True):
            assert np.array_equal(one.token_ids, other.token_ids)
            assert np.array_equal(one.log_probs, other.log_probs)
    of_objects = len(pickle.dumps(groups)) / sum(len(s.token_ids) for g in groups for s in g.samples)
    assert of_objects > 9.0, "the control: the samples themselves, texts and prompts included, take more"


@pytest.mark.parametrize("kind", [tuple, np.array])
def test_what_a_reward_may_have_made_of_a_sample_is_packed_too(kind) -> None:
    one = Sample.of_response("a@1/0", PROMPTS["a"], kind([4, 5]), kind([-1.5, -0.25]), "", "stop", (), 1.0)
    columns = pack_groups([Group("a@1", (one,))])
    assert (columns.tokens.dtype, columns.log_probs.dtype) == (np.int32, np.float32)
    assert (columns.tokens.tolist(), columns.log_probs.tolist()) == ([4, 5], [-1.5, -0.25])
