"""A real run that is watched: its timeline, its endpoint for Prometheus, torch's profiler, what it says."""

from __future__ import annotations

import gzip
import json
import re
import socket
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from mcore_rl.__main__ import main
from tests.e2e.ranks import Ranks
from tests.e2e.test_ours import grpo

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_watched_run_says_when_every_rank_and_server_did_what(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    scraped: dict[str, float] = {}
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(0.05):
            with suppress(OSError), urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
                for line in answer.read().decode().splitlines():
                    if not line.startswith("#"):
                        name, _, value = line.rpartition(" ")
                        scraped[name.partition("{")[0]] = float(value)

    scraper = threading.Thread(target=scrape)
    scraper.start()
    run = tmp_path / "run"
    watch = ("--watch.timeline", "true", "--watch.prometheus", address, "--watch.profile_steps", "[2, 2]")
    try:
        done = ranks.run(*grpo(folder, run, *watch, "--parallel.data", "2", url=server_url), world=2)
    finally:
        over.set()
        scraper.join(10)
    assert done.returncode == 0, done.stderr

    assert scraped["mcore_rl_step"] in (0, 1, 2)
    assert "mcore_rl_time_step" in scraped

    assert main(["report", str(run)]) == 0
    trace = json.loads((run / "timeline.json").read_bytes())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in trace if e["ph"] == "M"}
    assert set(names.values()) == {"rank 0", "rank 1", f"server {server_url}"}
    did = {lane: [e for e in trace if e["ph"] == "X" and names[e["pid"]] == lane] for lane in names.values()}
    for rank in ("rank 0", "rank 1"):
        assert {"rollout", "reward", "train", "publish", "eval", "save"} <= {e["name"] for e in did[rank]}
        assert len([e for e in did[rank] if e["name"] == "publish"]) == 3
    asked = {e["name"] for e in did[f"server {server_url}"]}
    assert "generate" in asked
    assert any("weights" in name for name in asked), "the publish, as the server sees it"
    (first, *_) = sorted(e["ts"] for e in did["rank 0"] if e["name"] == "train")
    generated = [e for e in did[f"server {server_url}"] if e["name"] == "generate"]
    assert any(e["ts"] + e["dur"] <= first for e in generated), "clocks agree: samples come before training"

    profiles = sorted((run / "profile").iterdir())
    assert [p.name for p in profiles] == ["steps_2-2.rank_0.json.gz", "steps_2-2.rank_1.json.gz"]
    events = json.loads(gzip.decompress(profiles[0].read_bytes()))["traceEvents"]
    assert any("backward" in str(e.get("name", "")).lower() for e in events), "the step's update is in it"

    said = done.stderr
    assert re.search(r"^grpo on \S+, fp32, 2 ranks \(data 2\): 2 steps of 4 prompts x 4 samples$", said, re.M)
    assert f"`mcore-rl report --follow {run}` shows it meanwhile" in said
    (line,) = re.findall(r"^step 2/2 .*$", said, re.M)
    assert re.search(r"tokens/s \d+  memory \d+\.\d GiB  publish \d+\.\d s  time left 0:00$", line), line
    assert "\x1b" not in said, "where no terminal is, nothing is drawn"
