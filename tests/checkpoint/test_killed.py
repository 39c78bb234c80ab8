"""A save that dies, at every point, leaves the last checkpoint as it was and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sources import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """Run tests/checkpoint/killed.py in a process of its own."""
    directory: Path = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.killed", str(directory)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_sigkill_at_every_write_point(answers: dict) -> None:
    points = answers["points"]
    fired = [point["at"] for point in points]
    assert all(point["signal"] == signal.SIGKILL for point in points)
    wanted = ["os.mkdir step_3.partial", "open __0_0.distcp", "open .metadata", "open manifest.json"]
    wanted += ["open COMMITTED", "os.rename step_3.partial", "os.remove COMMITTED"]
    at = [fired.index(point) for point in wanted]
    assert at == sorted(at), "the order that the promise rests on"
    renamed = at[wanted.index("os.rename step_3.partial")]
    for number, point in enumerate(points):
        assert point["found"] == (2 if number <= renamed else 3), point
        assert point["kept"] == (2 if number < renamed else 3), point
        assert point["left"] in (
            ["LOCK", "step_1", "step_2"],
            ["LOCK", "step_2", "step_3"],
            ["LOCK", "step_1", "step_2", "step_3"],
        ), point


def test_cut_off_in_the_middle_of_a_write(answers: dict) -> None:
    for cut in answers["cut"]:
        assert cut == {
            "signal": signal.SIGXFSZ,
            "found": 2,
            "kept": 2,
            "left": ["LOCK", "step_1", "step_2"],
        }


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("what", ["SIGKILL", "SIGSTOP", "fails"])
def test_a_rank_that_dies_hangs_or_fails_is_an_error_on_all_that_are_left(
    answers: dict, what: str, background: bool
) -> None:
    peer = answers["peer"][f"{what} {background}"]
    assert peer["fired"]
    assert len(peer["said"]) == (2 if what == "fails" else 1)
    why = "Input/output error" if what == "fails" else "a rank did not finish writing|is still not written"
    for said in peer["said"]:
        assert re.search(why, said["error"])
        assert said["seconds"] < 15, "the deadline was 3 s"
    assert (peer["found"], peer["kept"]) == (1, 1)
