"""Learning runs, outside ordinary CI: `make test-learn`. Their curves are committed under benchmarks/."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.learn import Curve, learn, write

pytestmark = [pytest.mark.learn, pytest.mark.timeout(7200)]
SEEDS = (0, 1, 2)
STEPS = 400


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learn")


@pytest.fixture(scope="module")
def curves(runs: Path) -> list[Curve]:
    made = [learn("gspo", runs, seed, STEPS) for seed in SEEDS]
    made.append(learn("gspo", runs, SEEDS[0], 50, control=True))
    write("gspo", made, Path(__file__).parents[2] / "benchmarks")
    return made


def test_gspo_learns_from_every_seed(curves: list[Curve]):
    for curve in curves:
        if not curve.control:
            assert curve.accuracy[0] <= 0.6
            assert curve.accuracy[-1] >= 0.9, curve


def test_without_a_learning_rate_nothing_changes(curves: list[Curve]):
    (control,) = (curve for curve in curves if curve.control)
    assert max(abs(value - control.accuracy[0]) for value in control.accuracy) <= 0.05, control
