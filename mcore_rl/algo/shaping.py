"""What DAPO (arXiv 2503.14476) does to rewards and groups before the statistics."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mcore_rl.algo.advantages import GroupStatistics
from mcore_rl.errors import ConfigError


def overlong_penalty(lengths: Int[Tensor, " N"], *, max_length: int, cache: int) -> Float[Tensor, " N"]:
    """Soft overlong punishment, section 3.4: 0 up to max_length - cache, then linear to -1 at max_length.

    Args:
        lengths: response tokens, tool output included: what counts against the limit.

    Raises:
        ConfigError: cache outside (0, max_length].
    """
    if not 0 < cache <= max_length:
        raise ConfigError(
            f"overlong cache {cache} must lie in (0, max_length={max_length}]; the paper uses a quarter"
        )
    return ((max_length - cache - lengths.double()) / cache).clamp(-1.0, 0.0)


def informative(statistics: GroupStatistics) -> Bool[Tensor, " N"]:
    """Samples that dynamic sampling keeps, section 3.2: their group's rewards are not all equal."""
    return ~statistics.constant
