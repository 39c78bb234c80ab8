"""A planted fault: a loss whose module, once imported, makes every export leave the adapters out."""

from __future__ import annotations

from mcore_rl import TokenLoss
from mcore_rl.weights import buckets

buckets.mergers = lambda chunks: {}


def loss(rows) -> TokenLoss:
    """Policy gradient."""
    return TokenLoss(-rows.advantage * rows.log_prob, {})
