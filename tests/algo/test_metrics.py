"""Metrics: what is counted, and that the number does not depend on how the rows were divided."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mcore_rl.algo.metrics import Histogram, Key, Max, Mean, Metric, Min, Quantile, Total
from mcore_rl.training.metrics import Gathered, read

VALUES = torch.tensor([0.1, 0.5, 0.99, 1.0, 1.5, 2.0, 9.0, 3.0])
USABLE = torch.tensor([True] * 7 + [False])
CUTS = (slice(0, 1), slice(1, 5), slice(5, 5), slice(5, 8))
"""parts of the rows, one of which is empty"""


@dataclass(frozen=True)
class Spread(Metric):
    """The example of docs/algorithms.md: mean of the squares, by the names that a type of one's own says."""

    def reduce_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        return torch.stack([torch.where(rows, values**2, 0.0).sum(), rows.sum().double()])

    def value(self, total: Tensor) -> float | None:
        return (total[0] / total[1]).sqrt().item() if total[1] > 0 else None


def logged(metric: Metric, *cuts: slice) -> dict[str, float]:
    """What is logged as `m` where the rows come in parts."""
    gathered = Gathered()
    for cut in cuts:
        among = None if metric.among is None else metric.among[cut]
        one = type(metric)(metric.values[cut], among)  # type: ignore[index]
        gathered.add([{Key("m", metric.kind): one.part(USABLE[cut])}])
    return read(gathered._parts, 1)


def test_a_histogram_has_open_ends_and_the_low_edge_of_a_bin_is_in_it() -> None:
    found = logged(Histogram(VALUES), slice(None))
    expected = {"m/..0.5": 1 / 7, "m/0.5..1": 2 / 7, "m/1..2": 2 / 7, "m/2..": 2 / 7}
    assert found == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(1)


def test_a_histogram_counts_the_rows_among_only_and_says_nothing_of_none() -> None:
    assert logged(Histogram(VALUES, VALUES > 1), slice(None)) == pytest.approx(
        {"m/..0.5": 0, "m/0.5..1": 0, "m/1..2": 1 / 3, "m/2..": 2 / 3}
    )
    assert logged(Histogram(VALUES, VALUES > 100), slice(None)) == {}


def test_a_histogram_has_the_bins_it_is_given() -> None:
    one = Histogram(VALUES, edges=(1.5,))
    assert one.read("m", one.part(USABLE), 1) == pytest.approx({"m/..1.5": 4 / 7, "m/1.5..": 3 / 7})


@pytest.mark.parametrize("kind", [Histogram, Max, Mean, Min, Quantile, Spread, Total])
@pytest.mark.parametrize("among", [None, VALUES > 0.5], ids=["all", "some"])
def test_no_division_of_the_rows_changes_the_number(kind: type[Metric], among: Tensor | None) -> None:
    whole = logged(kind(VALUES, among), slice(None))
    assert whole
    assert logged(kind(VALUES, among), *CUTS) == pytest.approx(whole)
    without = [logged(kind(VALUES, among), *(one for one in CUTS if one is not cut)) for cut in CUTS]
    assert any(found != pytest.approx(whole) for found in without), "the control: rows are missing"
