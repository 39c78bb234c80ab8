"""A reward that random weights earn unequally."""

from __future__ import annotations

from mcore_rl.types import Sample


def brevity(sample: Sample) -> float:
    """Fewer tokens are better."""
    return -float(len(sample.token_ids))
