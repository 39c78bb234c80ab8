"""What a loss declares to read beside its rows, from a way to add up whole sequences."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mcore_rl.algo.rows import OF_SEQUENCES, Rows, TokenLoss, ahead_by, averaged_by, declared, marked_by
from mcore_rl.errors import ConfigError

Sums = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(values [R], which rows count [R]) -> (sum, mean) over the whole sequence of each row, [R] each"""
Ahead = Callable[[Tensor, float], Tensor]
"""(values [R], discount) -> [R] their discounted sum over the row and those that follow in its sequence"""


def readings(
    loss: Callable[..., TokenLoss],
    rows: Rows,
    params: Mapping[str, Any],
    sums: Sums,
    *,
    kept: Tensor | None = None,
    marked: Tensor | None = None,
    ahead: Ahead | None = None,
) -> dict[str, Tensor]:
    """Everything that `loss` declares, by name; the order of the sums is the same on every rank.

    Args:
        kept: the rows that a correction leaves a weight; None: all.
        marked: the rows that were chosen before the rollout's first update; None: none.
        ahead: a way to add up what follows; None: a log-ratio to itself, which is 0.
    """
    names, found = declared(loss), {}
    current = rows.log_prob.detach()
    for name in OF_SEQUENCES:
        if name in names:
            other = rows.rollout if "rollout" in name else rows.old
            among = (
                rows.usable & kept if name == "sequence_kept_log_ratio" and kept is not None else rows.usable
            )
            total, mean = sums(current - other, among)
            found[name] = total if name.endswith("_sum") else mean
    with torch.no_grad():
        for name, values in sorted(averaged_by(loss).items()):
            found[name] = sums(values(rows, **shared(values, params)), rows.usable)[1]
        following = ahead_by(loss)
        if following is not None:
            values, discount = following(rows, **shared(following, params))
            values = torch.where(rows.usable, values, 0.0)
            found["ahead"] = torch.zeros_like(values) if ahead is None else ahead(values, discount)
    if "reference" in names & rows.extras.keys():
        found["reference"] = rows.reference
    if marked_by(loss) is not None:
        found["marked"] = torch.zeros_like(rows.usable) if marked is None else marked
    return found


def mark(
    loss: Callable[..., TokenLoss], params: Mapping[str, Any], advantage: Tensor, old: Tensor, rollout: Tensor
) -> Tensor:
    """[R] bool: the rows of a whole rollout that `loss` marks; one whose log-probs are not finite never is.

    Raises:
        ConfigError: the choice, perhaps the user's own, did not answer with one bool per row.
    """
    choice = marked_by(loss)
    found = torch.zeros(advantage.shape, dtype=torch.bool)
    if choice is None:
        return found
    usable = torch.isfinite(old) & torch.isfinite(rollout)
    chosen = choice(advantage[usable], old[usable], rollout[usable], **shared(choice, params))
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != old[usable].shape:
        raise ConfigError("the function of @marks must return one bool per row that it was given")
    found[usable] = chosen
    return found


def shared(function: Callable[..., Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `params` that `function` has as keyword-only parameters."""
    every = inspect.signature(function).parameters.values()
    return {p.name: params[p.name] for p in every if p.kind is p.KEYWORD_ONLY and p.name in params}
