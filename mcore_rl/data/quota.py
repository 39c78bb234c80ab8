"""How many prompts each part of a mixture gives: exact quotas, without chance."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def shares_of(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """The weights as shares that sum to 1, exact in the decimals that they are written with."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    return tuple(weight / sum(exact) for weight in exact)


def next_part(shares: Sequence[Fraction], given: Sequence[int]) -> int:
    """The part that gives the next prompt, after each has `given` so many.

    Balinski and Young's quota method (The Quota Method of Apportionment, 1975): of n prompts a part of share
    s has given floor(n s) or ceil(n s), whatever n is; so n s exactly, wherever that is a whole number.
    """
    n = sum(given) + 1
    below = [part for part, count in enumerate(given) if count < n * shares[part]]
    return max(below, key=lambda part: (shares[part] / (given[part] + 1), -part))
