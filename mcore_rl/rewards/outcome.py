"""What a reward function may return, and what it makes of a sample.

A reward function returns one of these for a sample:

- a number;
- a list or tuple of numbers, one per turn. A turn is a maximal run of trained tokens within a segment, and
  its reward is placed at its last token;
- a dict from the place of a token, counted among the sample's trained tokens, to the reward placed there,
  for turns that the environment tells apart in another way;
- a dict from names to any of the above: the parts of the reward, whose weighted sum it is;
- `Void(reason)`, where the response cannot be judged.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from mcore_rl.errors import RewardError
from mcore_rl.terminal import listed, quoted, short
from mcore_rl.types import TAKEN_PARTS, RewardPart, Sample, TurnReward

LARGEST = float(np.finfo(np.float32).max)
"""Rewards beyond this would be infinite as soon as they enter a float32 tensor."""
MOST_PARTS = 64
_NAME = re.compile(r"[\w.+-]+(/[\w.+-]+)*", re.ASCII)


@dataclass(frozen=True)
class Void:
    """A reward function returns this for a response that it cannot judge: the sample counts for nothing."""

    reason: str
    """a word or two, as the metric `void/<reason>` counts it"""
    why: str = ""
    """more of it, for the message that ends a run"""


Turns = Real | float | Sequence[float] | Mapping[int, float]
Returned = Turns | Mapping[str, Turns] | Void
"""what a reward function returns"""


@dataclass(frozen=True)
class Outcome:
    """The reward of one sample."""

    reward: float
    """finite; the weighted sum over parts and turns"""
    parts: tuple[RewardPart, ...] = ()
    turn_rewards: tuple[TurnReward, ...] = ()


@dataclass
class _Placed:
    """The weighted sum of all parts, by the token at which each lies."""

    tokens: int
    """m, the trained tokens of the sample"""
    ends: tuple[int, ...]
    """ends of its turns"""
    at: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    by_turn: bool = False


def read_outcome(
    returned: Any, sample: Sample, weights: Mapping[str, float], name: str = "", weight: float = 1.0
) -> Outcome:
    """What `returned` says of `sample`.

    Args:
        weights: part -> its weight in the sum; 1 where it is not named.
        name: of the function, where there are several: of the part that its reward is, and of parts before a
            slash. Empty, its parts keep their names.
        weight: of the function in the sum, by which those of its parts are multiplied.

    Raises:
        RewardError: it is none of the above, has a number that is not finite, or does not fit the sample's
            turns; the message continues "<function> returned".
    """
    placed = _Placed(sample.trained_tokens, turn_ends(sample))
    named = isinstance(returned, Mapping) and any(isinstance(key, str) for key in returned)
    if name:
        its = returned.items() if named else ()
        returned = {f"{name}/{key}": value for key, value in its} if named else {name: returned}
    elif not named:
        total = _value("", returned, 1.0, placed)
        return Outcome(total, (), _turns(placed))
    if len(returned) > MOST_PARTS:
        raise RewardError(f"{len(returned)} parts; return at most {MOST_PARTS}")
    parts = []
    for part, value in returned.items():
        if not isinstance(part, str) or not _NAME.fullmatch(part) or len(part) > 64 or part in TAKEN_PARTS:
            raise RewardError(
                f"a part called {quoted(part)}; return a name of letters, digits and _.+-/, which is none of "
                f"{listed(sorted(TAKEN_PARTS))}"
            )
        its_weight = weight * weights.get(part, 1.0)
        parts.append(RewardPart(part, _value(f"{part}: ", value, its_weight, placed), its_weight))
    total = math.fsum(part.weight * part.value for part in parts)
    return Outcome(_finite("a sum that is ", total), tuple(parts), _turns(placed))


def join_outcomes(outcomes: Sequence[Outcome], sample: Sample) -> Outcome:
    """What several functions say of a sample, together.

    Raises:
        RewardError: the sum is not finite; the message continues "<function> returned".
    """
    if len(outcomes) == 1:
        return outcomes[0]
    at: defaultdict[int, float] = defaultdict(float)
    last = sample.trained_tokens - 1
    by_turn = any(one.turn_rewards for one in outcomes)
    for one in outcomes if by_turn else ():
        for token, reward in one.turn_rewards or [(last, one.reward)][: last + 1]:
            at[token] += reward
    return Outcome(
        _finite("a sum that is ", math.fsum(one.reward for one in outcomes)),
        tuple(part for one in outcomes for part in one.parts),
        tuple(TurnReward(*one) for one in sorted(at.items())),
    )


def turn_ends(sample: Sample) -> tuple[int, ...]:
    """The last token of every turn, counted among the trained tokens of the sample."""
    ends: list[int] = []
    before = 0
    for segment in sample.segments:
        trained = len(segment.log_probs)
        if segment.trained is not None:
            gaps = np.diff(np.flatnonzero(segment.trained)) > 1
            ends += (before + np.flatnonzero(gaps)).tolist()
        if trained:
            ends.append(before + trained - 1)
        before += trained
    return tuple(ends)


def _value(name: str, value: Any, weight: float, placed: _Placed) -> float:
    """The sum of one part, whose tokens are noted in `placed`."""
    if isinstance(value, list | tuple):
        if len(value) != len(placed.ends):
            raise RewardError(
                f"{name}{len(value)} rewards, and the sample has {len(placed.ends)} turns; return a number "
                "for each"
            )
        at = list(zip(placed.ends, (_number(name, one) for one in value), strict=True))
    elif isinstance(value, Mapping):
        at = [(_token(name, key, placed.tokens), _number(name, one)) for key, one in value.items()]
    else:
        one = _number(name, value)
        if placed.tokens:
            placed.at[placed.tokens - 1] += weight * one
        return one
    placed.by_turn = True
    for token, one in at:
        placed.at[token] += weight * one
    return _finite(f"{name}a sum that is ", math.fsum(one for _, one in at))


def _turns(placed: _Placed) -> tuple[TurnReward, ...]:
    return tuple(TurnReward(*one) for one in sorted(placed.at.items())) if placed.by_turn else ()


def _token(name: str, key: Any, tokens: int) -> int:
    if isinstance(key, bool) or not isinstance(key, int | np.integer) or not 0 <= key < tokens:
        raise RewardError(
            f"{name}a reward at token {quoted(key)}, and the sample has {tokens} trained tokens; return "
            f"a place from 0 to {tokens - 1}"
        )
    return int(key)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RewardError(f"{name}{short(type(value).__name__)}; return a float")
    return _finite(name, value)


def _finite(name: str, value: Any) -> float:
    try:
        number = float(value)  # before it is compared: to a float16 every bound is infinite
    except OverflowError:
        number = math.inf
    if not -LARGEST <= number <= LARGEST:  # NaN compares false
        what = "NaN" if math.isnan(number) else "infinity or a number beyond float32"
        raise RewardError(f"{name}{what}; return a finite number")
    return number
