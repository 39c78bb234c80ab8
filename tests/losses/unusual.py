"""Losses that are no plain functions, or whose annotations cannot all be resolved while a run goes on."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from mcore_rl.algo.rows import TokenLoss
from tests.losses.wrong import declared

if TYPE_CHECKING:
    from mcore_rl.algo.rows import Rows


def for_checkers(rows: Rows, *, delta: float = 0.5) -> TokenLoss:
    """Its rows are imported for type checkers only."""
    return TokenLoss(-delta * rows.advantage * rows.log_prob)


def optional(rows: Rows, *, delta: float | None = None) -> TokenLoss:
    """The default does not say what the parameter is, and its annotation does."""
    return TokenLoss(-(delta or 1.0) * rows.advantage * rows.log_prob)


class Called:
    """Its objects are losses."""

    def __call__(self, rows: Rows, *, delta: float = 0.5) -> TokenLoss:
        return for_checkers(rows, delta=delta)


called = Called()
instance = called.__call__
bound = functools.partial(for_checkers, delta=0.5)
partly = functools.partial(declared)


def listed(rows: Rows, *, delta: list = []) -> TokenLoss:  # noqa: B006  the default is what is tested
    """A list is nothing that algorithm.params takes."""
    return for_checkers(rows)


def unknown(rows: Rows, *, delta: Rows | None = None) -> TokenLoss:
    """Neither the annotation nor the default says what it is."""
    return for_checkers(rows)


def nothing(rows: Rows, *, delta=None) -> TokenLoss:
    """It has no annotation, and its default says nothing."""
    return for_checkers(rows)
