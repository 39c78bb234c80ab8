"""What DAPO (arXiv 2503.14476) does to groups before the statistics."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from mcore_rl.algo.advantages import GroupStatistics


def informative(statistics: GroupStatistics) -> Bool[Tensor, " N"]:
    """Samples that dynamic sampling keeps, section 3.2: their group's rewards are not all equal."""
    return ~statistics.constant
