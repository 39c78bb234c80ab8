"""What a run writes about itself: metrics.jsonl, events.jsonl, times, and a line of progress for people.

Both files hold one JSON object per line, written with one call each, so that a crash can cut only the last;
the reader leaves a cut line out and a resumed run removes it. A full disk is a StorageError, and leaves both
files as they were.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcore_rl import strict_json
from mcore_rl.directories import append_line, storage_error, write_whole
from mcore_rl.errors import DataError
from mcore_rl.screen import SCREEN
from mcore_rl.spans import span

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
NON_FINITE = "non_finite"
"""JSON has no NaN or infinity: such a metric is written as null and named in the list under this key."""


class StepLog:
    """Appends one object per step to `run_dir/metrics.jsonl`; only rank 0 writes, the others do nothing."""

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int = 0,
        resume_step: int | None = None,
        send: Callable[[int, Mapping[str, Any]], None] = lambda *_: None,
    ) -> None:
        """Start a new log, replacing an older one, or with `resume_step` keep the steps up to it.

        `send` is handed every step that was written.
        """
        self._send = send
        self._path = run_dir / METRICS
        self._writes = rank == 0
        if self._writes:
            _make(run_dir)
            _truncate(self._path, -1 if resume_step is None else resume_step)

    def cut(self, step: int) -> None:
        """Keep the steps up to `step`, after which the run continues."""
        if self._writes:
            _truncate(self._path, step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a step; numpy and torch scalars become numbers.

        Raises:
            TypeError: a value is something else.
            ValueError: a metric has the name of what the log itself writes.
        """
        if taken := metrics.keys() & {"step", NON_FINITE}:
            raise ValueError(f"a metric is called {min(taken)!r}, which the log writes; give it another name")
        if self._writes:
            _append(self._path, _record({"step": step, **metrics}))
            self._send(step, metrics)

    def event(self, kind: str, **fields: Any) -> None:
        """Append to events.jsonl, on rank 0."""
        if self._writes:
            append_event(self._path.parent, kind, **fields)


def append_event(run_dir: Path, kind: str, **fields: Any) -> None:
    """Append `{"time": unix seconds, "kind": kind, ...}` to events.jsonl, from any rank."""
    _make(run_dir)
    _append(run_dir / EVENTS, _record({"time": round(time.time(), 3), "kind": kind, **fields}))


def read_metrics(path: Path, since: int = 0) -> list[dict[str, Any]]:
    """All complete lines of a metrics or events file, in order; lines cut by a crash are left out.

    `since` is a byte at which a line begins. Raises DataError when there is no such file, or it is a pipe or
    a device, whose end may never come.
    """
    return [record for record, _ in _records(path, since)]


def _records(path: Path, since: int = 0) -> Iterator[tuple[dict[str, Any], bytes]]:
    if os.path.exists(path) and not os.path.isfile(path):  # no error for a long name
        raise DataError(f"{path}: not a plain file; give the directory of a run that has begun")
    try:
        lines = path.read_bytes()[since:].splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give the directory of a run that has begun") from None
    for line in lines:
        try:
            record = strict_json.parse(line)
        except strict_json.JsonError:
            continue
        if isinstance(record, dict) and line.endswith(b"\n"):
            yield record, line


def _truncate(path: Path, last_step: int) -> None:
    """Keep the complete lines of steps <= last_step; all or nothing, so that a crash here loses no step."""
    kept = []
    if path.exists() and last_step >= 0:
        steps = ((record.get("step"), line) for record, line in _records(path))
        kept = [line for step, line in steps if type(step) is int and 0 <= step <= last_step]
    write_whole(path, b"".join(kept))


def _append(path: Path, record: Mapping[str, Any]) -> None:
    line = json.dumps(record, allow_nan=False, ensure_ascii=False)
    append_line(path, line.encode("utf-8", errors="replace") + b"\n")


def _make(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(run_dir, error) from error


def _record(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain numbers, strings, booleans and null; non-finite numbers as null, and named."""
    plain = {key: _plain(key, value) for key, value in values.items()}
    broken = [key for key, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
    return {**plain, **dict.fromkeys(broken), **({NON_FINITE: broken} if broken else {})}


def _plain(key: str, value: Any) -> float | int | str | bool | None:
    if getattr(value, "ndim", None) == 0:  # numpy and torch scalars
        value = value.item()
    if value is None or isinstance(value, (float, int, str)):
        return value
    raise TypeError(f"metric {key} is a {type(value).__name__}; log a number or a string")


def tell(what: str, *, is_main: bool) -> None:
    """Say to whoever waits what is being done where no step says it; on the main rank."""
    if is_main:
        SCREEN.say(what)
        if what.endswith(" ..."):
            SCREEN.doing(what.removesuffix(" ..."))


class Timers:
    """Seconds per phase of a step: `with timers("rollout"): ...`, then `timers.collect()` once per step.

    A phase inside another is part of that one: its seconds count there alone, so that phases add up.
    """

    def __init__(self) -> None:
        self._phases: dict[str, float] = {}
        self._inside = False
        self._since = time.monotonic()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to `phase`, also when it raises."""
        if self._inside:
            with span(phase):
                yield
            return
        start, self._inside = time.monotonic(), True
        try:
            with span(phase):
                yield
        finally:
            self._inside = False
            self._phases[phase] = self._phases.get(phase, 0.0) + time.monotonic() - start

    def collect(self) -> dict[str, float]:
        """`time/<phase>` of every phase, and `time/step` since the last call, in seconds; starts anew."""
        now = time.monotonic()
        times = {f"time/{phase}": seconds for phase, seconds in self._phases.items()}
        times["time/step"] = now - self._since
        self._phases, self._since = {}, now
        return times


class Progress:
    """Lines for people: `step 12/60  reward 0.71  loss 0.0021  1.9 s/step  time left 1:32`.

    What comes before the first step is no step, and neither is an evaluation: the pace is without them, and
    the time left has the evaluations that are to come.
    """

    SHOWN: Mapping[str, str] = {
        "reward/mean": "reward",
        "loss/policy": "loss",
        "loss/reward_model": "loss",
        "preference/accuracy": "accuracy",
        "kl/rollout": "kl",
        "clip/fraction": "clipped",
    }
    """Metric -> its short name in the line; those a step does not have are left out."""

    COST = (
        ("throughput/tokens_per_second", "tokens/s", 0, ""),
        ("memory/peak_gib", "memory", 1, " GiB"),
        ("time/publish", "publish", 1, " s"),
    )
    """metric, its name in the line, its decimals and unit"""

    def __init__(self, steps: int, eval_every: int = 0, words: Mapping[str, str] | None = None) -> None:
        """`words`: what the mean reward of a held-out set is called, where it is not as its metric."""
        self._steps, self._eval_every, self._words = steps, eval_every, words or {}
        self.share, self.left = 0.0, ""
        """of the steps that are done, and what is left of the run, after the last line"""
        self._recent: deque[float] = deque(maxlen=20)
        self._evaluated: list[float] = []
        """seconds of each evaluation"""

    def line(self, step: int, metrics: Mapping[str, Any]) -> str:
        """One step's line; the time left follows the mean of the last 20 steps.

        It is empty before the first step where nothing was measured.
        """
        evaluation = float(metrics.get("time/eval", 0.0))
        if evaluation:
            self._evaluated.append(evaluation)
        if step > 0:
            self._recent.append(float(metrics["time/step"]) - evaluation)
        shown = [f"{name} {float(metrics[key]):.4g}" for key, name in self.SHOWN.items() if key in metrics]
        over_long = metrics.get("data/train/passed_over")
        shown += [] if over_long is None else [f"over-long {float(over_long):.0f}"]
        held_out = [
            f"{self._held_out(key)} {float(value):.3f}{_of_how_many(key, metrics)}"
            for key, value in metrics.items()
            if key.startswith(("eval/", "validation/")) and key.endswith(("/accuracy", "/reward", "/loss"))
        ]
        pace = self._pace(step)
        cost = [
            f"{name} {float(metrics[key]):,.{digits}f}{unit}".replace(",", "\u202f")
            for key, name, digits, unit in self.COST
            if pace and metrics.get(key) is not None
        ]
        self.share = step / self._steps if self._steps else 1.0
        self.left = f"step {step}/{self._steps}  {pace[-1]}" if pace else f"step {step}/{self._steps}"
        said = [*shown, *held_out, *pace[:1], *cost, *pace[1:]]
        return "  ".join([f"step {step}/{self._steps}", *said]) if said else ""

    def _held_out(self, key: str) -> str:
        name, _, what = key.removeprefix("eval/").rpartition("/")
        is_reward = key.startswith("eval/") and what == "accuracy"
        return f"{name} {self._words.get(name, what) if is_reward else what}"

    def _pace(self, step: int) -> list[str]:
        if not self._recent:
            return []
        pace = sum(self._recent) / len(self._recent)
        left = (self._steps - step) * pace
        if self._evaluated:
            left += self._evaluations_after(step) * sum(self._evaluated) / len(self._evaluated)
        return [f"{pace:.1f} s/step", f"time left {clock(left)}"]

    def _evaluations_after(self, step: int) -> int:
        """How many are to come; the last step has one in any case."""
        if step >= self._steps:
            return 0
        every = self._eval_every or self._steps
        return -(-self._steps // every) - step // every


def _of_how_many(key: str, metrics: Mapping[str, Any]) -> str:
    """` (4 of 16 prompts)`: how many of its file a held-out mean is of; nothing where it is not known."""
    name, _, measure = key.rpartition("/")
    counts = ("labels" if measure == "loss" else "sampled", "prompts")
    sampled, prompts = (metrics.get(f"{name}/{what}") for what in counts)
    return f" ({sampled:.0f} of {prompts:.0f} prompts)" if sampled and prompts else ""


def clock(seconds: float) -> str:
    """`1:32`, `2:05:00`: minutes and seconds, with hours when there are any."""
    minutes, secs = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
