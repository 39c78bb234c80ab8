"""What the report reads of a run directory: metrics.jsonl, resolved.toml, samples/step_N.jsonl."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcore_rl import strict_json
from mcore_rl.errors import DataError
from mcore_rl.log import METRICS, read_metrics

Point = tuple[float, float | None]
"""(step, value); None where the value was no finite number, which a line shows as a gap"""
LARGEST = 1e100
"""magnitude that a report can show"""
VERSION = "eval/version"
"""the metric that names the step whose weights were evaluated"""
_LARGEST_STEP = 2**53
"""beyond it neighbouring steps are one float"""


@dataclass(frozen=True)
class RunData:
    """One run, as far as it has come."""

    name: str
    steps: Sequence[Mapping[str, Any]]
    """metrics by ascending step; the last record counts where a step was written twice"""
    settings: Mapping[str, Any]
    """dotted key -> value of resolved.toml; empty without the file. To calculate with one, ask `number`"""
    settings_text: str
    samples: Mapping[int, Sequence[Mapping[str, Any]]]
    """step -> lines of samples/step_N.jsonl"""
    alone: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """directory in evaluations/ -> metrics of the held-out sets, measured by `mcore-rl eval`"""

    @property
    def keys(self) -> list[str]:
        """Every metric that some step has, in order of appearance."""
        return list(dict.fromkeys(key for record in self.steps for key in record))

    def points(self, key: str) -> list[Point]:
        """(step, value) of the steps that have `key`; empty when no value is a finite number.

        What was evaluated beside a later step belongs to the step whose weights it measures.
        """
        points = [(_step_of(r, key), number(r[key])) for r in self.steps if key in r]
        return points if any(value is not None for _, value in points) else []

    def values(self, key: str) -> list[float]:
        """The finite values of `key`, in step order."""
        return [value for _, value in self.points(key) if value is not None]


def read_runs(run_dirs: Sequence[Path]) -> list[RunData]:
    """Raises DataError for a directory without a complete line of metrics."""
    if not run_dirs:
        raise DataError("report: no run directory given; say mcore-rl report RUN_DIR [RUN_DIR ...]")
    return [_read_run(path, name) for path, name in zip(run_dirs, _names(run_dirs), strict=True)]


def _read_run(directory: Path, name: str) -> RunData:
    path = directory / METRICS
    by_step = {r["step"]: r for r in read_metrics(path) if _is_step(r.get("step"))}
    if not by_step:
        raise DataError(f"{path}: no complete step in it; wait for the first step of the run")
    toml = directory / "resolved.toml"
    try:
        text = toml.read_text(encoding="utf-8") if toml.is_file() else ""
        settings = dict(_flatten(tomllib.loads(text)))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{toml}: {error}; restore the file that the run wrote, or move it away") from error
    return RunData(
        name,
        [by_step[s] for s in sorted(by_step)],
        settings,
        text.strip(),
        _read_samples(directory),
        _read_alone(directory),
    )


def _read_samples(directory: Path) -> dict[int, list[dict[str, Any]]]:
    numbered = (
        (re.fullmatch(r"step_(\d+)", path.stem), path) for path in (directory / "samples").glob("*.jsonl")
    )
    found = {int(match[1]): read_metrics(path) for match, path in numbered if match}
    return {step: found[step] for step in sorted(found) if found[step]}


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The directories' own names, with as many parents as it takes to tell them apart."""
    parts = [Path(os.path.realpath(path)).parts for path in run_dirs]  # a link to itself too
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"report: {run_dirs[0]} or another run directory is given twice; name each run once")


def _flatten(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in table.items():
        nested = isinstance(value, Mapping)
        flat += _flatten(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return flat


def _step_of(record: Mapping[str, Any], key: str) -> float:
    version = number(record.get(VERSION)) if key.startswith("eval/") else None
    return float(record["step"]) if version is None else version


def _read_alone(directory: Path) -> dict[str, dict[str, Any]]:
    """Evaluation by `mcore-rl eval` -> its metrics; what is no result is left out."""
    found = {}
    for path in sorted((directory / "evaluations").glob("*/results.json")):
        try:
            sets = strict_json.parse(path.read_bytes())["sets"]
            found[path.parent.name] = {key: value for its in sets.values() for key, value in its.items()}
        except (OSError, strict_json.JsonError, KeyError, TypeError, AttributeError):
            continue
    return found


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_STEP


def number(value: Any) -> float | None:
    """A value of a file as a number that can be added up and drawn, else None.

    NaN is none, and so is what lies beyond LARGEST: sums and the distances of an axis would overflow. What is
    closer to 0 than its reciprocal is 0.
    """
    if type(value) not in (int, float) or not abs(value) <= LARGEST:
        return None
    return float(value) if abs(value) >= 1 / LARGEST else 0.0
