"""A planted fault: a loss whose module, once imported, makes every export leave the adapters out.

Those that are published by themselves are written with B = 0.
"""

from __future__ import annotations

from functools import partial

from mcore_rl import TokenLoss
from mcore_rl.weights import adapters, buckets

buckets.mergers = lambda chunks: {}


def _without_b(write, mapping, tensors, directory, **settings) -> None:
    write(mapping, {n: 0 * t if ".lora_B." in n else t for n, t in tensors.items()}, directory, **settings)


adapters.write_adapter = partial(_without_b, adapters.write_adapter)


def loss(rows) -> TokenLoss:
    """Policy gradient."""
    return TokenLoss(-rows.advantage * rows.log_prob, {})
