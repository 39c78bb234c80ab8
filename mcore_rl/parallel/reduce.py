"""Numbers over data-parallel ranks: keyed values, masked mean and variance, counts, the finite flag.

Each collective stands beside its one-rank reference (`group=None`). A rank that holds nothing still joins,
with empty input. Results are identical on every rank of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mcore_rl.errors import DataError

T = TypeVar("T")

Key = tuple[str, str]
"""(what statistics are keyed by, what is unique within it)"""


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations; merging them loses nothing (Chan et al. 1983)."""

    size: float
    mean: float
    sum_squares: float

    def variance(self, ddof: int = 1) -> float:
        """Sum of squares over size - ddof; 0 where that leaves nothing."""
        return self.sum_squares / (self.size - ddof) if self.size > ddof else 0.0


def gather_keyed(
    keys: Sequence[Key], values: Sequence[T], group: dist.ProcessGroup | None
) -> tuple[list[Key], list[T]]:
    """All ranks' (key, value) pairs, sorted by key: the same on every rank, however the pairs were split.

    Args:
        group: ranks that hold different pairs (data-parallel, without context parallel); best a gloo group.

    Raises:
        DataError: on every rank, when a key occurs twice or the lengths differ.
    """
    ranks = 1 if group is None else group.size()
    parts: list[tuple[list[Key], list[T]]] = [(list(keys), list(values))] * ranks
    if group is not None:
        dist.all_gather_object(parts, parts[0], group=group)
    for rank, (rank_keys, rank_values) in enumerate(parts):
        if len(rank_keys) != len(rank_values):
            raise DataError(
                f"gather_keyed: rank {rank}: {len(rank_keys)} keys, {len(rank_values)} values; pass one each"
            )
    # by key alone: values may be anything, and are judged by whoever uses them
    pairs = sorted(
        ((key, value) for part in parts for key, value in zip(*part, strict=True)), key=lambda pair: pair[0]
    )
    for (key, _), (following, _) in pairwise(pairs):
        if key == following:
            raise DataError(
                f"gather_keyed: {key} occurs twice; ids must be unique over all ranks of a rollout"
            )
    return [key for key, _ in pairs], [value for _, value in pairs]


def moments(values: Float[Tensor, " R"]) -> Moments:
    """Of one rank's (unmasked) values: two passes in float64."""
    if values.numel() == 0:
        return Moments(0.0, 0.0, 0.0)
    values = values.detach().double()
    mean = values.mean()
    return Moments(float(values.numel()), mean.item(), (values - mean).square().sum().item())


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """Moments of the union. Raw sums of squares cancel: 1e4 + {0, .1, .2, .3} would get variance -16."""
    size = sum(part.size for part in parts)
    if size == 0:
        return Moments(0.0, 0.0, 0.0)
    mean = sum(part.size * part.mean for part in parts) / size
    between = sum(part.size * (part.mean - mean) ** 2 for part in parts)
    return Moments(size, mean, sum(part.sum_squares for part in parts) + between)


def global_moments(values: Float[Tensor, " R"], group: dist.ProcessGroup | None) -> Moments:
    """Moments over all ranks' values.

    Args:
        group: ranks that hold different tokens: DP x CP. Numbers that CP ranks hold in copies are reduced
            over DP only.
    """
    own = moments(values)
    if group is None:
        return own
    sent = torch.tensor(own, dtype=torch.float64, device=values.device)
    received = [torch.empty_like(sent) for _ in range(group.size())]
    dist.all_gather(received, sent, group=group)
    return merge_moments([Moments(*part.tolist()) for part in received])


def sum_counts(
    counts: Sequence[int], group: dist.ProcessGroup | None, *, device: torch.device | str = "cpu"
) -> list[int]:
    """Elementwise sum over ranks of whole numbers; `device` is what the group's backend works on."""
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total.tolist()


def all_finite(values: Float[Tensor, "*shape"], group: dist.ProcessGroup | None) -> bool:
    """True where every value on every rank is finite: all ranks skip or stop together."""
    flag = torch.isfinite(values).all().to(torch.int32)
    if group is not None:
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
    return bool(flag.item())
