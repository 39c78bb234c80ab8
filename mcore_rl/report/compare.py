"""Two runs' metrics, step by step: equal, or where and how far apart. Times are not compared."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_rl.errors import ConfigError, DataError, McoreRLError, NumericsError
from mcore_rl.metric_names import MEASURED
from mcore_rl.report.runs import RunData, number, read_runs
from mcore_rl.terminal import CommandParser, printable, short


@dataclass(frozen=True)
class MetricDifference:
    """A metric that differs."""

    key: str
    first_step: int
    steps: int
    """how many differ"""
    largest: float
    """relative; infinite where one of the two is missing or no number"""


def differences(one: RunData, other: RunData, relative: float = 0.0) -> tuple[list[MetricDifference], int]:
    """The metrics that differ by more than `relative` on the steps of both runs; how many steps those are.

    A step between them that only one run has differs too. One run may have begun later or ended earlier.

    Raises:
        DataError: the runs have no step in common.
    """
    left, right = ({record["step"]: record for record in run.steps} for run in (one, other))
    shared = sorted(left.keys() & right.keys())
    if not shared:
        raise DataError(f"{one.name} and {other.name} have no step in common")
    found: dict[str, MetricDifference] = {}
    gaps = sorted(s for s in left.keys() ^ right.keys() if shared[0] < s < shared[-1])
    if gaps:
        found["step"] = MetricDifference("step", gaps[0], len(gaps), math.inf)
    for step in shared:
        for key, distance in _apart(left[step], right[step], relative).items():
            before = found.get(key, MetricDifference(key, step, 0, 0.0))
            found[key] = MetricDifference(
                key, before.first_step, before.steps + 1, max(before.largest, distance)
            )
    return list(found.values()), len(shared)


def _apart(one: Mapping[str, Any], other: Mapping[str, Any], relative: float) -> dict[str, float]:
    keys = [key for key in one.keys() | other.keys() if not key.startswith(MEASURED)]
    distances = {key: _distance(one.get(key), other.get(key)) for key in sorted(keys)}
    return {key: distance for key, distance in distances.items() if distance > relative}


def _distance(one: Any, other: Any) -> float:
    """Relative; 0 only where the two are equal (two NaNs are)."""
    if one == other or (one != one and other != other):
        return 0.0
    left, right = number(one), number(other)
    if left is None or right is None or left == right:
        return math.inf
    return abs(left - right) / max(abs(left), abs(right))


def main(argv: Sequence[str] | None = None) -> int:
    """`compare_runs.py RUN_DIR RUN_DIR [--rtol R]`: 0 if equal, 70 if not."""
    parser = CommandParser(prog="compare_runs.py", description=__doc__)
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN_DIR")
    parser.add_argument("--rtol", type=float, default=0.0, help="relative difference that counts as equal")
    arguments = parser.parse_args(argv)
    try:
        if not 0 <= arguments.rtol < 1:  # with NaN nothing would differ, and from 1 on hardly anything
            raise ConfigError(f"--rtol {arguments.rtol:g}: give a number from 0 to below 1")
        one, other = read_runs(arguments.runs)
        found, steps = differences(one, other, arguments.rtol)
    except McoreRLError as error:
        print(printable(f"compare_runs.py: {type(error).__name__}: {error}"), file=sys.stderr)
        return error.exit_code
    for d in found:
        where = f"{d.steps} of {steps} steps, first {d.first_step}"
        print(printable(f"{short(d.key)}: differs in {where}, by up to {d.largest:.3g}"))
    alone = " and ".join(f"{len(run.steps) - steps} of {run.name}" for run in (one, other))
    print(printable(f"{steps} steps compared, {len(found)} metrics differ by more than {arguments.rtol:g}"))
    print(printable(f"not compared, in one run only: {alone}"))
    return NumericsError.exit_code if found else 0
