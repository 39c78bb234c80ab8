"""Memory that servers give up between rollouts: what a real server is asked, in which order, and how often.

On a CPU SGLang answers these calls and has no GPU memory to give.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from mcore_rl.errors import RolloutError
from mcore_rl.log import read_metrics
from mcore_rl.rollout.client import RolloutClient, call
from tests.e2e.conftest import Task, run, task  # noqa: F401 a fixture
from tests.rollout.proxy import Proxy, proxy_beside, status
from tests.sglang.conftest import KEY_ENV, sglang_server

WATCHED = {
    "/generate": "generate",
    "/flush_cache": "idle",
    "/release_memory_occupation": "release",
    "/resume_memory_occupation": "resume",
    "/update_weights_from_disk": "load",
}
STEP = ["idle", "release weights kv_cache", "resume weights", "load", "resume kv_cache", "generate"]


def order(front: Proxy) -> list[str]:
    """The watched calls; one for several of a kind in a row."""

    def say(path: str, body: Any) -> str:
        return " ".join([WATCHED[path], *(body.get("tags", []) if isinstance(body, dict) else [])])

    said = [say(path, body) for path, body in front.calls if path in WATCHED]
    return [name for name, _ in groupby(said)]


def test_a_run_releases_after_generation_and_takes_back_in_order(task: Task, tmp_path: Path) -> None:  # noqa: F811
    pairs = zip(task.rl[::2], task.rl[1::2], strict=True)
    flags = [flag for pair in pairs if "threads" not in pair[0] for flag in pair]
    flags += ["--run.dir", str(tmp_path / "run"), "--train.steps", "2", "--residency.servers", "released"]
    with (
        sglang_server(task.root / "warm_start" / "model", tmp_path / "log") as server,
        proxy_beside(server.url) as front,
    ):
        done = run(
            "train", "examples/gspo_tiny.toml", *flags, "--rollout.urls", f"['{front.url}']", deadline=500
        )
    assert done.returncode == 0, done.stderr
    assert order(front) == ["load", "generate", *STEP, *STEP]
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]
    assert len(steps) == 2
    assert all(step["publish/probe_max_abs"] <= 2e-4 for step in steps)
    assert not any("publish/stale_max_abs" in step for step in steps)  # nothing older is there to compare


def test_each_call_is_made_once(dense_url: str, dense_dirs: tuple[Path, Path]) -> None:
    """A retry after a lost reply would end the server. It serves on: nothing is released at the end."""
    with proxy_beside(dense_url, status(503), path="/release_memory_occupation") as front:
        client = RolloutClient(front.url, api_key_env=KEY_ENV, timeout=60.0)
        with pytest.raises(RolloutError, match="after 1 attempts"):
            call(client, lambda opened: opened.release_memory())
        assert len(front.bodies("/release_memory_occupation")) == 1
        call(client, lambda opened: opened.resume_memory("weights"))
        call(client, lambda opened: opened.update_weights_from_disk(str(dense_dirs[1]), "1"))
        call(client, lambda opened: opened.resume_memory("kv_cache"))
        replies = call(client, lambda opened: opened.generate([[1, 2, 3]], [{"max_new_tokens": 2}], ["a"]))
    assert [span.version for span in replies[0].versions] == ["1"]
    assert front.bodies("/resume_memory_occupation") == [{"tags": ["weights"]}, {"tags": ["kv_cache"]}]
