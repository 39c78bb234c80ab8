"""What the length of a response costs; a part of a reward."""

from __future__ import annotations

from mcore_rl.errors import ConfigError
from mcore_rl.types import Sample


def overlong_penalty(length: int, *, max_length: int, cache: int) -> float:
    """Soft overlong punishment: 0 up to max_length - cache tokens, then linear to -1 at max_length.

    DAPO, arXiv 2503.14476 section 3.4, eq. 13.

    Args:
        length: response tokens, tool output included: what counts against the limit.

    Raises:
        ConfigError: cache outside (0, max_length].
    """
    if not 0 < cache <= max_length:
        raise ConfigError(
            f"overlong cache {cache} must lie in (0, max_length={max_length}]; the paper uses a quarter"
        )
    return min(0.0, max(-1.0, (max_length - cache - length) / cache))


def overlong(sample: Sample, *, max_length: int, cache: int) -> float:
    """The penalty of a sample's own length, as a reward function of its own; see overlong_penalty."""
    return overlong_penalty(sample.trained_tokens, max_length=max_length, cache=cache)
