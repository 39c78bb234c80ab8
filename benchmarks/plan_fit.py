"""Fits the efficiencies of mcore_rl/plan/clock.py to the published steps that are marked so.

    python -m benchmarks.plan_fit

Least squares of log(estimate / published) over those rows of mcore_rl.plan.published, by a search along one
number after the other. Dense models have two free numbers (training's share of the FLOPs, decoding's of both
peaks), mixtures five; scoring reaches 0.7 of training's share in both (the 70B step of v0.3, whose phases
were published, had 1.04, and no row tells them apart), and publishing of dense models is that step's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from mcore_rl.plan.clock import DENSE, MIXTURE, Efficiency, SamplingServers, step_seconds
from mcore_rl.plan.published import FITTED, STEPS, Step

SCORING = 0.7
MOST = 0.6
"""of a share"""


def dense(numbers: Sequence[float]) -> Efficiency:
    """Of (train, decode)."""
    train, decode = (min(MOST, n) for n in numbers)
    return replace(DENSE, train=train, log_probs=SCORING * train, bytes=decode, decode=decode)


def mixture(numbers: Sequence[float]) -> Efficiency:
    """Of (train, decode, layer, layer_across, publish)."""
    train, decode, layer, across, publish = numbers
    return Efficiency(
        train=min(MOST, train),
        log_probs=SCORING * min(MOST, train),
        bytes=DENSE.bytes,
        decode=min(MOST, decode),
        layer=layer,
        layer_across=across,
        publish=publish,
    )


def loss(steps: Sequence[Step], e: Efficiency) -> float:
    """Sum of squares."""
    total = 0.0
    for step in steps:
        servers = SamplingServers(step.gpus - step.training if step.training else step.gpus, step.server)
        model = step.model
        found = step_seconds(model.shape, model.parameters, step.planned_layout(), step.work(), servers, e)
        total += math.log(found.total / step.seconds) ** 2
    return total


def fit(
    steps: Sequence[Step], kind: Callable[[Sequence[float]], Efficiency], start: Sequence[float]
) -> Efficiency:
    """The best of `kind` by its free numbers."""
    best, size = list(start), 0.2
    least = loss(steps, kind(best))
    while size > 1e-3:
        better = False
        for i in range(len(best)):
            for factor in (math.exp(size), math.exp(-size)):
                tried = [*best[:i], best[i] * factor, *best[i + 1 :]]
                if (its := loss(steps, kind(tried))) < least:
                    best, least, better = tried, its, True
        size *= 1.0 if better else 0.6
    return kind(best)


def main() -> None:
    """Print both."""
    fitted = [step for step in STEPS if step.role == FITTED]
    for name, kind, start, sparse in (
        ("DENSE", dense, (DENSE.train, DENSE.decode), False),
        (
            "MIXTURE",
            mixture,
            (MIXTURE.train, MIXTURE.decode, MIXTURE.layer, MIXTURE.layer_across, 2e10),
            True,
        ),
    ):
        steps = [step for step in fitted if bool(step.model.shape.experts) == sparse]
        print(name, fit(steps, kind, start))


if __name__ == "__main__":
    main()
