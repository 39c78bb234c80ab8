"""The suite that the embedded server passes, against SGLang: it fails when the recordings have drifted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.sglang.conftest import ROOT

SUITE = "tests/rollout/test_conformance.py"


def test_the_embedded_servers_suite_passes_unchanged(
    moe_url: str, moe_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    target = {"MCORE_RL_CONFORMANCE_URL": moe_url, "MCORE_RL_CONFORMANCE_MODEL": str(moe_dirs[1])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", SUITE]
    with (tmp_path / "log").open("w+") as log:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | target, stdout=log, stderr=log, timeout=400, check=False
        )
        log.seek(0)
        said = log.read()
    assert done.returncode == 0, said
    assert " passed" in said
    assert "skipped" not in said
