"""The wheel by itself: the demo begins from it, far from the repository, and is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from mcore_rl.log import read_metrics
from tests.launched import ENVIRONMENT
from tests.sources import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.xdist_group("wheel")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip wheel` builds."""
    out = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    built = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    if "hatchling" in built.stderr and "No matching distribution" in built.stderr:
        pytest.skip("the package index has no hatchling, which builds it")
    assert built.returncode == 0, built.stderr
    (built,) = out.glob("*.whl")
    return built


def test_what_it_says_of_itself(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith("METADATA"))
        said = message_from_string(archive.read(metadata).decode())
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == "<3.15,>=3.11"
    assert {"Summary", "Author", "Keywords", "Classifier", "Description-Content-Type"} <= set(said.keys())
    assert {f"mcore_rl/demo/{one}" for one in ("arithmetic.py", "sft_tiny.toml", "gspo_tiny.toml")} <= set(
        names
    )
    assert "mcore_rl/report/style.css" in names
    assert not [name for name in names if name.startswith(("tests", "examples", "benchmarks"))]


def test_the_demo_begins_and_ctrl_c_says_what_is_saved(wheel: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True, timeout=100)
    python = fresh / "bin" / "python"
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = Path(
        subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    (place / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its .pth files are not read
    log = tmp_path / "log"
    words = [python, "-m", "mcore_rl", "demo", "here", "--parallel.tensor", "1", "--train.steps", "100000"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT
    with log.open("wb") as out:
        process = subprocess.Popen(
            words, cwd=tmp_path, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        end = time.monotonic() + 300
        while b"step 2/" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(100) == 130
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    said = log.read_text()
    assert "the report will be here/report.html" in said
    assert "asked to leave: the running step is finished and saved first" in said
    assert re.search(r"asked to leave: step \d+ is saved; --resume latest continues after it", said)
    events = read_metrics(tmp_path / "here" / "warm_start" / "events.jsonl")
    assert [event["exit_code"] for event in events if event["kind"] == "end"] == [75]
