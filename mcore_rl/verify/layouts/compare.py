"""Errors of one layout against one rank, and their limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mcore_rl.verify.layouts.case import LOSSES

if TYPE_CHECKING:
    from mcore_rl.verify.layouts.measure import Measured

LIMITS = {
    "loss": 2e-6,  # |difference| / sum |w l|
    "log_prob": 1e-5,  # absolute, as entropy and value
    "entropy": 1e-5,
    "value": 1e-5,
    "gradient": 1e-5,  # per tensor: |difference| / max(its largest entry, 1e-6 of the largest of all)
    "exp_avg": 1e-5,  # as gradient
    "parameter": 1e-5,  # after 3 steps of SGD: |difference| / largest movement of any parameter
    "metric": 1e-5,  # |difference| / largest entry: one token more, or clipped otherwise, is far above it
}
"""Largest error of each quantity that is not a failure."""

SMALLEST_MOVEMENT = 1e-3
"""Below it the comparison of parameters would prove nothing."""


@dataclass(frozen=True)
class Errors:
    """Largest errors of one algorithm at one layout against one rank."""

    layout: str
    algorithm: str
    """or `critic`, for what an algorithm with a critic trains beside its policy"""
    largest: Mapping[str, float]
    """quantity of LIMITS -> error; only those that the algorithm has"""

    @property
    def exceeded(self) -> list[str]:
        """Quantities whose error is above the limit, or not a number."""
        return [name for name, error in self.largest.items() if not error <= LIMITS[name]]


def compare(layout: str, algorithm: str, got: Measured, reference: Measured) -> Errors:
    """Errors of `got` relative to `reference`."""
    scores = {
        name: (got.scores[name] - values).abs().max().item() for name, values in reference.scores.items()
    }
    return Errors(
        layout,
        algorithm,
        {
            "loss": abs(got.loss - reference.loss) / reference.abs_loss,
            **scores,
            "gradient": relative_error(got.gradients, reference.gradients, floor=1e-6),
            "exp_avg": relative_error(got.exp_avg, reference.exp_avg, floor=1e-6),
            "parameter": parameter_error(got, reference),
            "metric": relative_error(_but_losses(got), _but_losses(reference), floor=0.0),
        },
    )


def _but_losses(measured: Measured) -> dict[str, Tensor]:
    """The metrics without the loss, which is compared by itself."""
    return {name: value for name, value in measured.metrics.items() if name not in LOSSES}


def relative_error(got: Mapping[str, Tensor], reference: Mapping[str, Tensor], *, floor: float) -> float:
    """Largest over tensors of |difference| / max(own largest entry, `floor` of the largest of all).

    Infinite where a tensor is missing or not finite.
    """
    if got.keys() != reference.keys():
        return math.inf
    largest = max(tensor.abs().max().item() for tensor in reference.values())
    worst = 0.0
    for name, tensor in reference.items():
        difference = (got[name] - tensor).abs().max().item()
        scale = max(tensor.abs().max().item(), floor * largest)
        error = difference / scale if scale else (0.0 if difference == 0 else math.inf)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def parameter_error(got: Measured, reference: Measured) -> float:
    """|parameter - reference| over the largest movement; infinite when nothing moved enough to tell."""
    if got.parameters.keys() != reference.parameters.keys():
        return math.inf
    movement = max((reference.parameters[n] - reference.start[n]).abs().max().item() for n in reference.start)
    if not movement > SMALLEST_MOVEMENT:
        return math.inf
    errors = [(got.parameters[n] - reference.parameters[n]).abs().max().item() for n in reference.parameters]
    return max(error if math.isfinite(error) else math.inf for error in errors) / movement


def summary(layouts: Sequence[str], results: Sequence[Errors]) -> dict[str, Any]:
    """The json object of `mcore-rl verify layouts --json`."""

    def largest(quantity: str) -> float:
        return max((e.largest[quantity] for e in results if quantity in e.largest), default=0.0)

    return {
        "layouts": len(layouts),
        "failed": len({e.layout for e in results if e.exceeded}),
        "max_loss_error": largest("loss"),
        "max_log_prob_error": largest("log_prob"),
        "max_grad_error": largest("gradient"),
        **{
            f"max_{name}_error": largest(name)
            for name in ("entropy", "value", "exp_avg", "parameter", "metric")
        },
        "rows": [{"layout": e.layout, "algorithm": e.algorithm, **e.largest} for e in results],
    }
