"""What a loss may measure, one value per row, and how the values of all rows become one number of the log.

A metric is named once, where it is measured, as people read it in metrics.jsonl and in the report. Its `part`
is what one call of the loss contributes: parts are added up (or the largest is taken) over micro-batches and
ranks, so that no layout and no packing changes the number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mcore_rl.errors import NumericsError

MAGNITUDES = torch.logspace(-8, 2, 201, dtype=torch.float64)
"""bin edges of `Quantile`, 20 per decade: any layout reads the same quantile off them"""
_SINGLE = 100
"""rows from which on one of them alone does not make a quantile"""


@cache
def _edges(device: torch.device) -> Tensor:
    """MAGNITUDES where they are needed; copied once."""
    return MAGNITUDES.to(device)


@dataclass(frozen=True)
class Metric:
    """The base of all metrics. A type of one's own says `reduce_rows` and `value`; see docs/algorithms.md."""

    values: Tensor | None
    """one per row, of the shape of log_prob; None in the metric's `kind`"""
    among: Tensor | None = None
    """bool, of the same shape: the rows that count; None: all"""
    of_all_rows: bool = False
    """rows that are not usable count, too"""
    largest: ClassVar[bool] = False
    """the largest of the parts is taken, rather than their sum"""

    @property
    def kind(self) -> Metric:
        """The metric without its tensors: it tells any rank how to read the reduced parts."""
        return replace(self, values=None, among=None)

    def part(self, usable: Tensor) -> Tensor:
        """Reduce the rows that are `usable`, and count, in float64."""
        assert self.values is not None
        rows = usable if self.among is None else usable & self.among
        return self.reduce_rows(self.values.detach().double(), rows)

    def read(self, name: str, total: Tensor, updates: int) -> dict[str, float]:
        """Turn the reduced parts into what is logged under `name`; nothing where no row counted.

        `updates` is the number of optimizer steps whose parts are in `total`.
        """
        found = self.value(total)
        return {} if found is None else {name: found}

    def reduce_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """Reduce the `values` of the `rows` that count (bool) to a tensor of a shape that is always the same.

        Picking the rows out would make a GPU wait; there may be none.
        """
        raise NotImplementedError

    def value(self, total: Tensor) -> float | None:
        """Turn the reduced parts into the number that is logged; None where no row counted."""
        raise NotImplementedError


class Key(NamedTuple):
    """Which metric a reduced tensor belongs to."""

    name: str
    kind: Metric


@dataclass(frozen=True)
class Mean(Metric):
    """The mean over the rows; of booleans, the fraction that is true."""

    def reduce_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """See Metric.reduce_rows."""
        return torch.stack([torch.where(rows, values, 0.0).sum(), rows.sum().double()])

    def value(self, total: Tensor) -> float | None:
        """See Metric.value."""
        return (total[0] / total[1]).item() if total[1] > 0 else None


@dataclass(frozen=True)
class Max(Metric):
    """The largest value of any row."""

    largest: ClassVar[bool] = True

    def reduce_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """See Metric.reduce_rows."""
        return _largest(values, rows)

    def value(self, total: Tensor) -> float | None:
        """See Metric.value."""
        return None if total.isneginf() else total.item()


@dataclass(frozen=True)
class Min(Metric):
    """The smallest value of any row."""

    largest: ClassVar[bool] = True

    def reduce_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """See Metric.reduce_rows."""
        return _largest(-values, rows)

    def value(self, total: Tensor) -> float | None:
        """See Metric.value."""
        return None if total.isneginf() else -total.item()


@dataclass(frozen=True)
class Quantile(Metric):
    """The upper edge of the bin of MAGNITUDES in which `fraction` of the magnitudes |value| is reached.

    See quantile_rank for a fraction that is close to 1.
    """

    fraction: float = 0.5

    def reduce_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """See Metric.reduce_rows."""
        magnitudes = values.abs().clamp(1e-8, 99.0).reshape(-1)
        bins = torch.bucketize(magnitudes, _edges(values.device), right=True) - 1
        counts = values.new_zeros(len(MAGNITUDES)).index_add(0, bins, rows.double().reshape(-1))
        return counts[:-1]  # what is no number has no magnitude: it is behind the last edge

    def value(self, total: Tensor) -> float | None:
        """See Metric.value."""
        if not total.sum() > 0:
            return None
        rank = quantile_rank(self.fraction, total.sum().item())
        return float(MAGNITUDES[int(torch.searchsorted(total.cumsum(0), rank)) + 1])


@dataclass(frozen=True)
class Histogram(Metric):
    """The fraction of the rows in each bin, logged as `<name>/<low>..<high>`, low edge included.

    The first and the last bin are open: `..<low>` and `<high>..`.
    """

    edges: tuple[float, ...] = (0.5, 1.0, 2.0)

    def reduce_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """See Metric.reduce_rows."""
        bins = torch.bucketize(values, values.new_tensor(self.edges), right=True).reshape(-1)
        return values.new_zeros(len(self.edges) + 1).index_add(0, bins, rows.double().reshape(-1))

    def read(self, name: str, total: Tensor, updates: int) -> dict[str, float]:
        """Return one number per bin; see Metric.read."""
        count = total.sum().item()
        bounds = ["", *(f"{edge:g}" for edge in self.edges), ""]
        bins = [f"{name}/{low}..{high}" for low, high in pairwise(bounds)]
        return {key: one / count for key, one in zip(bins, total.tolist(), strict=True)} if count else {}


@dataclass(frozen=True)
class Total(Metric):
    """The sum over the rows of an optimizer step, such as that of a weighted loss."""

    def reduce_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """See Metric.reduce_rows."""
        return torch.where(rows, values, 0.0).sum()

    def read(self, name: str, total: Tensor, updates: int) -> dict[str, float]:
        """Return the mean over optimizer steps."""
        return {name: total.item() / updates}


def parts_of(
    metrics: Mapping[str, Metric], usable: Bool[Tensor, "*shape"], everything: Bool[Tensor, "*shape"]
) -> dict[Key, Tensor]:
    """The parts of all `metrics`, each `Metric.part`; those that are reduced alike are reduced together.

    Args:
        everything: true at every row, for metrics that are `of_all_rows`.
    """
    alike: dict[Any, list[str]] = {}
    for name, metric in metrics.items():
        own = type(metric).part is not Metric.part
        alike.setdefault(name if own else type(metric).reduce_rows, []).append(name)
    found = {}
    for reduce, names in alike.items():
        some = [metrics[name] for name in names]
        rows = [everything if metric.of_all_rows else usable for metric in some]
        if reduce not in _TOGETHER:
            parts: Iterable[Tensor] = [one.part(its) for one, its in zip(some, rows, strict=True)]
        else:
            values = torch.stack([cast(Tensor, metric.values).detach() for metric in some]).double()
            among = [its if m.among is None else its & m.among for m, its in zip(some, rows, strict=True)]
            parts = _TOGETHER[reduce](values.flatten(1), torch.stack(among).flatten(1))
        found |= dict(zip(names, parts, strict=True))
    return {Key(name, metric.kind): found[name] for name, metric in metrics.items()}


def _means(values: Tensor, rows: Tensor) -> Iterable[Tensor]:
    return torch.stack([torch.where(rows, values, 0.0).sum(1), rows.sum(1).double()], 1)


def _maxima(values: Tensor, rows: Tensor) -> Iterable[Tensor]:
    seen = torch.where(rows, values, -torch.inf)
    return seen.amax(1) if seen.shape[1] else seen.new_full((len(seen),), -torch.inf)


def _totals(values: Tensor, rows: Tensor) -> Iterable[Tensor]:
    return torch.where(rows, values, 0.0).sum(1)


_TOGETHER: Mapping[Any, Callable[[Tensor, Tensor], Iterable[Tensor]]] = {
    Mean.reduce_rows: _means,
    Max.reduce_rows: _maxima,
    Total.reduce_rows: _totals,
}
"""`reduce_rows` of one metric -> that of values [K, R] of K metrics, each of its own rows (bool)"""


def quantile_rank(fraction: float, rows: float) -> float:
    """How many of `rows`, from the smallest on, a quantile covers: `fraction` of them.

    Of a hundred rows or more the largest is left out. The 99.9 % quantile of 600 rows would be their maximum,
    and one row would decide it.
    """
    reached = fraction * rows
    return min(reached, rows - 1) if rows >= _SINGLE else reached


def _largest(values: Tensor, rows: Tensor) -> Tensor:
    seen = torch.where(rows, values, -torch.inf)
    return seen.max() if seen.numel() else seen.new_tensor(-torch.inf)


ALERT_RATIO = 1.05


class GradientScale(NamedTuple):
    """The gradient scale of the lm_head, measured and predicted; means over scored tokens.

    With dL/dlogits = coef / T (onehot - p), its L1 norm is 2 |coef| (1 - p_y) / T. Over tokens drawn from p,
    E[1 - p_y] = 1 - sum p^2 <= 1 - e^(-H), because the collision entropy is at most the Shannon entropy H;
    and by Jensen mean(1 - p_y) <= 1 - e^(-mean cross-entropy) on any data.
    """

    measured: float
    """|c| (1 - p_y), c the loss's derivative in log_prob before the aggregation weight"""
    predicted: float
    """|A| (1 - e^(-H)) per token: A and H correlate, so it is not a product of means"""
    surprise: float
    """1 - p_y"""
    cross_entropy: float
    """-log p_y, in nats"""

    @property
    def ratio(self) -> float:
        """measured / predicted: at most 1 up to sampling noise on the first, on-policy mini-batch of a step.

        A ratio that stays above ALERT_RATIO there points at shifted labels, another temperature, top-p, or a
        mismatch between the engines.
        """
        return self.measured / self.predicted if self.predicted > 0 else 0.0

    @property
    def surprise_bound(self) -> float:
        """1 - e^(-cross_entropy), exact for every batch."""
        return -math.expm1(-self.cross_entropy)


def gradient_scale_sums(
    log_prob: Float[Tensor, " R"],
    entropy: Float[Tensor, " R"],
    advantage: Float[Tensor, " R"],
    coefficient: Float[Tensor, " R"],
) -> Float[Tensor, " terms"]:
    """[measured, predicted, surprise, cross-entropy, tokens] summed over rows in float64.

    Add them up over DP x CP before `gradient_scale`.

    Args:
        coefficient: dloss/dlog_prob of the per-token loss, before the aggregation weight.
    """
    given = (log_prob, entropy, advantage, coefficient)
    log_p, spread, a, c = torch.stack([x.detach() for x in given]).double()
    surprise = -torch.expm1(log_p)
    terms = [c.abs() * surprise, a.abs() * -torch.expm1(-spread), surprise, -log_p, torch.ones_like(log_p)]
    return torch.stack(terms).sum(1)


def gradient_scale(sums: Float[Tensor, " terms"]) -> GradientScale:
    """Global sums of `gradient_scale_sums` -> means; all 0 for no token."""
    *totals, tokens = sums.tolist()
    return GradientScale(*(total / max(tokens, 1.0) for total in totals))


def check_surprise(scale: GradientScale, *, tolerance: float = 1e-6) -> None:
    """Assert mean(1 - p_y) <= 1 - e^(-cross-entropy), which holds exactly for whatever data.

    Raises:
        NumericsError: it does not: log-probs and probabilities come from different distributions.
    """
    # `not <=` rather than `>`: a NaN must not pass
    if not scale.surprise <= scale.surprise_bound + tolerance:
        raise NumericsError(
            f"lm_head: mean(1 - p) = {scale.surprise:.6g} exceeds 1 - exp(-CE) = {scale.surprise_bound:.6g}; "
            "check temperature, vocabulary padding and precision of the head"
        )
