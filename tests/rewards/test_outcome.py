"""What a reward function may return: numbers, turns, tokens and parts, read into a sample's fields."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from mcore_rl.errors import RewardError
from mcore_rl.rewards.outcome import Outcome, read_outcome, turn_ends
from mcore_rl.types import Prompt, RewardPart, Sample, Segment, TurnReward

PROMPT = Prompt("p", "", (1, 2), "")


def segment(mask: str) -> Segment:
    """`1` for a trained token, `0` for an observation; `all` trains three tokens without a mask."""
    trained = None if mask == "all" else np.array([mark == "1" for mark in mask], bool)
    length = 3 if trained is None else len(mask)
    count = length if trained is None else int(trained.sum())
    return Segment((7,), (5,) * length, (-1.0,) * count, (), trained)


def sample(*masks: str) -> Sample:
    return Sample("p@1/0", PROMPT, tuple(map(segment, masks)), "", "stop")


@pytest.mark.parametrize(
    ("masks", "ends"),
    [
        (["all"], (2,)),
        (["111"], (2,)),
        (["1101110"], (1, 4)),
        (["0001"], (0,)),
        (["000"], ()),
        (["110", "011"], (1, 3)),
        (["all", "all"], (2, 5)),
        (["101", "000", "10011"], (0, 1, 2, 4)),
    ],
)
def test_a_turn_ends_where_a_run_of_trained_tokens_does(masks, ends):
    assert turn_ends(sample(*masks)) == ends


def by_hand(one: Sample) -> tuple[int, ...]:
    """Token by token: the next of the segment is not trained, or there is none."""
    ends, number = [], -1
    for part in one.segments:
        marks = [True] * len(part.token_ids) if part.trained is None else part.trained.tolist()
        for here, following in zip(marks, [*marks[1:], False], strict=True):
            number += here
            if here and not following:
                ends.append(number)
    return tuple(ends)


def test_turns_of_random_masks_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(300):
        masks = ["".join(rng.choice(["0", "1"], size=rng.integers(1, 9))) for _ in range(rng.integers(1, 4))]
        one = sample(*masks)
        assert turn_ends(one) == by_hand(one)


THREE = sample("1101110", "01")
"""turns that end at the trained tokens 1, 4 and 5"""


@pytest.mark.parametrize(
    ("returned", "wanted"),
    [
        (0.5, Outcome(0.5)),
        ([1, 0, 0.25], Outcome(1.25, (), (TurnReward(1, 1.0), TurnReward(4, 0.0), TurnReward(5, 0.25)))),
        ({3: 2.0, 0: 1.0}, Outcome(3.0, (), (TurnReward(0, 1.0), TurnReward(3, 2.0)))),
        (
            {"a": 1.0, "b": np.float32(0.5)},
            Outcome(3.0, (RewardPart("a", 1.0, 2.0), RewardPart("b", 0.5, 2.0))),
        ),
        (
            {"a": 1, "other": (0.5, 0, 0)},
            Outcome(
                2.5,
                (RewardPart("a", 1.0, 2.0), RewardPart("other", 0.5, 1.0)),
                (TurnReward(1, 0.5), TurnReward(4, 0.0), TurnReward(5, 2.0)),
            ),
        ),
        (
            {"a": {5: 1.0}, "b": [0, 0, 3]},
            Outcome(
                8.0,
                (RewardPart("a", 1.0, 2.0), RewardPart("b", 3.0, 2.0)),
                (TurnReward(1, 0.0), TurnReward(4, 0.0), TurnReward(5, 8.0)),
            ),
        ),
    ],
)
def test_every_form_is_read(returned, wanted):
    found = read_outcome(returned, THREE, {"a": 2.0, "b": 2.0, "none": 9.0})
    assert found == wanted
    assert math.isclose(found.reward, sum(turn.reward for turn in found.turn_rewards) or found.reward)


def test_a_sample_without_a_trained_token_has_a_reward_and_no_place_for_it():
    assert read_outcome({"a": 1.0, "b": []}, sample("000"), {}) == Outcome(
        1.0, (RewardPart("a", 1.0, 1.0), RewardPart("b", 0.0, 1.0))
    )
    with pytest.raises(RewardError, match="1 rewards, and the sample has 0 turns"):
        read_outcome([1.0], sample("000"), {})


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0, 2.0], "2 rewards, and the sample has 3 turns"),
        ([1.0, 2.0, math.nan], "^NaN"),
        ([1.0, True, 0.0], "^bool"),
        ([3e38, 3e38, 0.0], "a sum that is infinity"),
        ({6: 1.0}, "at token 6, and the sample has 6 trained tokens; return a place from 0 to 5"),
        ({-1: 1.0}, "at token -1"),
        ({True: 1.0}, "at token True"),
        ({1.0: 1.0}, r"at token 1\.0"),
        ({1: None}, "^NoneType"),
        ({"a": "1"}, "^a: str"),
        ({"a": True}, "^a: bool"),
        ({"a": {"b": 1.0}}, "^a: a reward at token 'b'"),
        ({"a": 1.0, 3: 1.0}, "a part called 3"),
        ({"": 1.0}, "a part called ''"),
        ({"no_signal": 1.0}, "a part called 'no_signal'"),
        ({"a\n": 1.0}, "a part called"),
        ({"a" * 65: 1.0}, "a part called"),
        ({"a//b": 1.0}, "a part called"),
        ({str(k): 1.0 for k in range(65)}, "65 parts; return at most 64"),
        ({"a": 3e38}, "a sum that is infinity"),
    ],
)
def test_what_does_not_fit_is_refused(returned, said):
    with pytest.raises(RewardError, match=said):
        read_outcome(returned, THREE, {"a": 2.0})


def test_an_empty_dict_is_a_reward_of_nothing():
    assert read_outcome({}, THREE, {}) == Outcome(0.0)


def test_the_fields_of_a_sample_take_it():
    found = read_outcome({"a": [1, 2, 3]}, THREE, {})
    scored = replace(THREE, reward=found.reward, parts=found.parts, turn_rewards=found.turn_rewards)
    assert scored.reward == 6.0
    assert scored.turn_rewards[-1] == TurnReward(5, 3.0)


@pytest.mark.parametrize(
    "value", [1, 0.5, np.float32(0.5), np.float64(-2), np.int64(3), Fraction(1, 4), -3e38]
)
def test_real_numbers_become_floats(value):
    reward = read_outcome(value, THREE, {}).reward
    assert type(reward) is float
    assert reward == value


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (True, "bool"),
        (np.bool_(True), "bool"),
        (None, "NoneType"),
        ("1", "str"),
        (1j, "complex"),
        (torch.tensor(1.0), "Tensor"),
        (np.array(1.0), "ndarray"),
        (math.nan, "NaN"),
        (np.float32("nan"), "NaN"),
        (math.inf, "infinity"),
        (-math.inf, "infinity"),
        (np.float16("inf"), "infinity"),
        (10**400, "infinity"),
        (1e39, "beyond float32"),
        pytest.param(10**5000, "beyond float32", id="huge"),
    ],
)
def test_anything_else_is_refused(value, what):
    with pytest.raises(RewardError, match=rf"{what}.*; return a"):
        read_outcome(value, THREE, {})
