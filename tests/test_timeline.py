"""The timeline: spans of ranks and servers as a Chrome trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcore_rl.directories import mark
from mcore_rl.errors import DataError
from mcore_rl.timeline import BATCH, TimelineFile, trace, write_trace

RUN = "0123456789abcdef"


def record(lane: str, name: str, start: float, seconds: float) -> dict[str, object]:
    return {"lane": lane, "name": name, "start": start, "seconds": seconds}


def spans(events: list[dict]) -> set[tuple]:
    return {(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"}


def test_every_rank_and_server_is_a_process_and_what_overlaps_is_in_rows() -> None:
    url = "http://a:1"
    ranks = {
        0: [
            record("", "score", 11, 1),
            record("", "train", 10, 4),
            record("", "publish", 14, 1),
            record(url, "generate", 10, 2),
            record(url, "generate", 11, 2),
            record(url, "generate", 12.5, 1),
        ],
        1: [record("", "train", 10, 3)],
    }
    made = trace(ranks)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in made if e["ph"] == "M"}
    assert sorted(names.values()) == ["rank 0", "rank 1", f"server {url}"]
    (server,) = (pid for pid, name in names.items() if name.startswith("server"))
    us = 1_000_000
    assert spans(made) == {
        (0, 0, "train", 10 * us, 4 * us),
        (0, 0, "score", 11 * us, us),  # inside it
        (0, 0, "publish", 14 * us, us),
        (1, 0, "train", 10 * us, 3 * us),
        (server, 0, "generate", 10 * us, 2 * us),
        (server, 1, "generate", 11 * us, 2 * us),  # at the same time
        (server, 0, "generate", 12_500_000, us),
    }


def test_files_of_the_run_that_is_there_make_the_trace(tmp_path: Path) -> None:
    assert write_trace(tmp_path) is None, "a directory without a run"
    mark(tmp_path, "run", run=RUN)
    assert write_trace(tmp_path) is None, "a run without a timeline"
    for rank in (0, 1):
        file = TimelineFile(tmp_path, RUN, rank, pytest.fail)
        for number in range(BATCH + 3):
            file.ended("", "train", 100.0 + number, 0.5)
        file.flush()
    TimelineFile(tmp_path, "another" * 4, 2, pytest.fail).ended("", "train", 1.0, 1.0)
    torn = tmp_path / "timeline" / f"{RUN[:8]}.rank_0.jsonl"
    others = b'[]\n{"lane": "", "name": 3}\n{"lane": "", "name": "x", "start": "1", "seconds": 1}\n{"la'
    torn.write_bytes(torn.read_bytes() + others)
    path = write_trace(tmp_path)
    assert path == tmp_path / "timeline.json"
    assert len(spans(json.loads(path.read_bytes())["traceEvents"])) == 2 * (BATCH + 3)
    assert write_trace(tmp_path) == path, "its own is replaced"
    path.write_text("mine")
    with pytest.raises(DataError, match="no timeline of this command"):
        write_trace(tmp_path)


def test_a_disk_that_takes_nothing_ends_the_timeline_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "timeline").write_text("a file is in its way")
    notes: list[str] = []
    file = TimelineFile(tmp_path, RUN, 0, notes.append)
    for _ in range(3 * BATCH):
        file.ended("", "train", 1.0, 1.0)
    file.flush()
    assert len(notes) == 1
    assert "the timeline ends here" in notes[0]
