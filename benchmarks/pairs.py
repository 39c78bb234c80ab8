"""What it costs that both answers of a pair share a micro-batch: micro-batches, and the heaviest replica.

    python benchmarks/pairs.py

Lengths are log-normal (median 400 tokens, sigma 0.7, at most 4096), 256 pairs a step, seeded. The other way,
answers packed wherever there is room and their log-probs exchanged, needs a forward pass of the policy before
the step: a third of what forward and backward pass cost.
"""

from __future__ import annotations

import numpy as np

from mcore_rl.data.balance import max_over_mean
from mcore_rl.data.packing import micro_batches

PAIRS, BUDGET, STEPS = 256, 16384, 20


def packed(lengths: np.ndarray, replicas: int, together: int) -> tuple[int, float]:
    """(micro-batches of the step on each replica, the heaviest replica's tokens over the mean)."""
    units = lengths.reshape(-1, together).sum(1)
    bins = micro_batches(units, units.astype(float), replicas, BUDGET)
    shares = [[unit for one in of_rank for unit in one] for of_rank in bins]
    return len(bins[0]), max_over_mean(units, shares)


def main() -> None:
    """Print a line per number of replicas."""
    for replicas in (1, 4, 16):
        rng = np.random.default_rng(0)
        found = []
        for _ in range(STEPS):
            drawn = np.exp(np.log(400) + 0.7 * rng.standard_normal(2 * PAIRS))
            lengths = np.clip(drawn, 1, 4096).astype(np.int64)
            found.append([*packed(lengths, replicas, 1), *packed(lengths, replicas, 2)])
        alone, alone_load, pairs, pairs_load = np.mean(found, axis=0)
        print(
            f"{replicas:3} replicas: {alone:5.2f} micro-batches alone, {pairs:5.2f} in pairs; heaviest over "
            f"mean {alone_load:.4f} alone, {pairs_load:.4f} in pairs"
        )


if __name__ == "__main__":
    main()
