"""The spans of one process in a file of a run, and the files of all of them as a Chrome trace.

RUN_DIR/timeline/RUN.rank_N.jsonl has a line for each span that rank N saw, of itself and of servers that it
asked. Clocks of several nodes differ by what their time service leaves.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mcore_rl import strict_json
from mcore_rl.directories import append_line, read_mark, write_whole
from mcore_rl.errors import DataError, StorageError
from mcore_rl.spans import HERE

NAME, TRACE = "timeline", "timeline.json"
"""the directory of the files in a run's, and the trace that is made of them"""
BATCH = 200
"""spans that are written at once"""
MICRO = 1_000_000
"""of a second: the unit of a Chrome trace is the microsecond"""
_SERVERS = 1_000_000
"""ids of processes from which those of servers begin"""


class TimelineFile:
    """A spans.Listener that writes. One that cannot says so once, and writes no more."""

    def __init__(self, run_dir: Path, run: str, rank: int, note: Callable[[str], None]) -> None:
        """`run` is the run's id; `note` is told why nothing more is written."""
        self._path, self._note = run_dir / NAME / f"{run[:8]}.rank_{rank}.jsonl", note
        self._lock = threading.Lock()
        self._lines: list[bytes] = []
        self._broken = False

    def begun(self, lane: str, name: str) -> None:
        """See spans.Listener."""

    def ended(self, lane: str, name: str, start: float, seconds: float) -> None:
        """See spans.Listener."""
        record = {"lane": lane, "name": name, "start": round(start, 6), "seconds": round(seconds, 6)}
        with self._lock:
            self._lines.append(json.dumps(record).encode() + b"\n")
            due = len(self._lines) >= BATCH
        if due:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered."""
        with self._lock:
            lines, self._lines = self._lines, []
            if self._broken or not lines:
                return
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                append_line(self._path, b"".join(lines))
                return
            except (OSError, StorageError) as error:
                self._broken = True
                why = str(error)
        self._note(f"the timeline ends here: {why}")


def write_trace(run_dir: Path) -> Path | None:
    """Make RUN_DIR/timeline.json of the files of the run that is there; None where it kept none.

    Raises:
        DataError: something else wrote timeline.json.
        StorageError: it cannot be written.
    """
    run = str(read_mark(run_dir).get("run", ""))[:8]
    found = {}
    for path in sorted((run_dir / NAME).glob(f"{run}.rank_*.jsonl")) if run else ():
        match = re.fullmatch(r".*\.rank_(\d{1,7})\.jsonl", path.name)
        if match and path.is_file():
            found[int(match[1])] = list(_records(path))
    if not any(found.values()):
        return None
    target = run_dir / TRACE
    if target.exists() and b'"mcore_rl"' not in target.read_bytes()[:200]:
        raise DataError(f"{target} is no timeline of this command: it would be replaced. Move it away")
    write_whole(target, json.dumps(trace(found)))
    return target


def trace(by_rank: Mapping[int, Iterable[Mapping[str, Any]]]) -> dict[str, Any]:
    """A Chrome trace: a process for each rank and for each server; what overlaps is in rows of its own."""
    lanes: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    servers: dict[str, int] = {}
    for rank, records in sorted(by_rank.items()):
        for record in records:
            lane = str(record["lane"])
            process = rank if lane == HERE else servers.setdefault(lane, _SERVERS + len(servers))
            lanes.setdefault((process, lane), []).append(record)
    events: list[dict[str, Any]] = []
    for (process, lane), records in lanes.items():
        name = f"rank {process}" if lane == HERE else f"server {lane}"
        events.append({"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}})
        events += _rows(process, records)
    return {"otherData": {"by": "mcore_rl"}, "displayTimeUnit": "ms", "traceEvents": events}


def _rows(process: int, records: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Each span in the first row in which it overlaps nothing, but what it lies wholly inside."""
    rows: list[list[float]] = []
    """ends of the spans that are open in each row, the innermost last"""
    for record in sorted(records, key=lambda one: (one["start"], -one["seconds"])):
        start, end = record["start"], record["start"] + record["seconds"]
        for open_ends in rows:
            while open_ends and open_ends[-1] <= start + 1e-6:
                open_ends.pop()
        inside = record["lane"] == HERE
        free = [n for n, ends in enumerate(rows) if not ends or (inside and end <= ends[-1] + 1e-6)]
        number = free[0] if free else len(rows)
        if not free:
            rows.append([])
        rows[number].append(end)
        yield {
            "ph": "X",
            "name": record["name"],
            "pid": process,
            "tid": number,
            "ts": round(start * MICRO),
            "dur": round(record["seconds"] * MICRO),
        }


def _records(path: Path) -> Iterable[Mapping[str, Any]]:
    """Its whole lines; what is no span is left out."""
    for line in path.read_bytes().splitlines():
        try:
            record = strict_json.parse(line)
        except strict_json.JsonError:
            continue
        named = isinstance(record, dict) and isinstance(record.get("name"), str) and "lane" in record
        if named and all(_is_time(record.get(key)) for key in ("start", "seconds")):
            yield record


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1e12
